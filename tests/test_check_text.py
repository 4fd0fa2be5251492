"""The text output of `check` and `rule`: headlines, tables, verdicts, hints, and the output of `--fix` and `--diff`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, call, edited
from reports import damaged, finding, healthy, made_up
from rich.text import Text

from lora_probe.checking import NotRun, Report
from lora_probe.checking import check as checking
from lora_probe.ledger import Ledger
from lora_probe.render.console import wrapped
from lora_probe.render.text.fix import change
from lora_probe.rules import all_rules


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made_up(tmp_path, monkeypatch)


def test_rules_that_were_not_run_fail_when_strict(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_base(folders: Sequence[Path], **_: Any) -> Iterator[Report]:
        return (replace(healthy(folder), not_run=(NotRun(("LP301",), "no base"),)) for folder in folders)

    monkeypatch.setattr(checking, "check_all", without_base)
    status, out, _ = call("check", "healthy", capsys=capsys)
    assert status == 0
    assert "not run because no base: 1 rule (LP301)" in out
    assert out.startswith("no findings in healthy/; 1 rule was not run\n")
    assert call("check", "healthy", "--strict", capsys=capsys)[0] == 1


def test_nothing_is_ok_where_rules_were_not_run(runs: Path, capsys: Any) -> None:
    for name in ("baseless", "baseless-2", "baseless-3"):
        (runs / name).mkdir()
    status, out, _ = call("check", "baseless", capsys=capsys)
    assert status == 0
    assert "peft, vllm  90 modules read, no problems in the files; effect unknown because" in out
    assert out.count("takes effect") == 0
    assert out.count("90: layers 0-29 q_proj, k_proj, v_proj") == 1
    assert out.startswith("no findings in baseless/; 2 rules were not run\n")
    _, out, _ = call("check", "baseless", "baseless-2", "baseless-3", "healthy", "damaged", capsys=capsys)
    summary, _, *lines = out.splitlines()
    assert lines[0].split() == ["verdict", "adapter", "findings", "first", "cause"]
    why = f"{'':22}the base model was not found"
    assert lines[1:3] == [f"unknown  {name}{why}" for name in ("baseless  ", "baseless-2")]
    assert lines[4].split() == ["ok", "healthy"]
    assert summary.startswith("5 adapters: 1 without findings, 3 not fully judged, 1 with errors; ")
    data = json.loads(call("check", "baseless", "healthy", "--format", "json", capsys=capsys)[1])
    assert data["summary"]["with_rules_not_run"] == 1


def test_what_is_ignored_is_counted(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in adapters:
            yield replace((damaged if folder.name == "damaged" else healthy)(folder), ignored=3)

    monkeypatch.setattr(checking, "check_all", check_all)
    assert call("check", "healthy", capsys=capsys)[1].startswith("no findings in healthy/ (3 ignored)\n")
    assert (
        "1 error, 1 warning in damaged/ (3 ignored); 1 rule was not run\n" in call("check", "damaged", capsys=capsys)[1]
    )
    out = call("check", "--recursive", capsys=capsys)[1]
    assert "ok       healthy          (3 ignored)\n" in out
    assert out.splitlines()[0].endswith(" (18 ignored)")
    assert json.loads(call("check", "healthy", "--format", "json", capsys=capsys)[1])["ignored"] == 3


@pytest.mark.parametrize("kind", ["damaged", "healthy"])
def test_the_last_hint_mends_what_can_be(kind: str, runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in adapters:
            report = {"damaged": damaged, "healthy": healthy}[kind](folder)
            yield replace(report, diagnostics=(*report.diagnostics, finding("LP213", "`_orig_mod`")))

    monkeypatch.setattr(checking, "check_all", check_all)
    err = call("check", "warned/", "--model", "my base", capsys=capsys)[2]
    assert err.endswith("hint: lora-probe check warned --model 'my base' --fix -o warned-fixed\n")
    monkeypatch.chdir(runs / "warned")
    err = call("check", capsys=capsys)[2]
    assert err.endswith(f"hint: lora-probe check . --fix -o {runs.resolve()}/warned-fixed\n")


def test_text(runs: Path, capsys: Any) -> None:
    _, out, err = call("check", "damaged", capsys=capsys)
    lines = out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert lines[0] == "1 error, 1 warning in damaged/; 1 rule was not run"
    assert lines[-2:] == ["adapter     damaged", "base model  unknown"]
    assert "peft  90 of 90 modules take effect" in lines
    hole = "3 lost at stored: layer 5 q_proj, k_proj, v_proj are not in the file (LP204)"
    assert f"vllm  87 of 90 modules take effect, {hole}" in lines
    header = next(line for line in lines if line.startswith("modules in vllm "))
    assert header.split()[3:] == ["stored", "read", "placed", "fate"]
    at = lines.index(f"error LP204 not-in-the-file: {hole}")
    assert lines[at + 1] == "  damaged/adapter_model.safetensors, vllm"
    assert lines[at + 2].startswith("  hint: save the adapter again")
    assert "  damaged/adapter_config.json:12, peft/vllm" in lines
    assert "not run because no base: 1 rule (LP301)" in lines
    assert "hint: lora-probe rule LP204" in err
    _, out, err = call("check", "healthy", capsys=capsys)
    assert out.endswith("\n\nadapter        healthy\nbase model     base\npredicted for  vLLM 0.32\n")
    assert err.startswith("note: `runs` holds")
    assert "peft, vllm  90 of 90 modules take effect\n" in out
    assert "placed" not in out
    assert out.startswith("no findings in healthy/\n")
    assert err == err.splitlines(keepends=True)[0]


def test_text_of_many(runs: Path, capsys: Any) -> None:
    status, out, err = call("check", "--recursive", capsys=capsys)
    assert status == 1
    assert err.startswith("6 adapters below .\n")
    first = [line.split()[:2] for line in out.splitlines()[3:9]]
    order = ["damaged", "deep/damaged-2", "deep/healthy-9", "deep/healthy-10", "healthy", "warned"]
    words = ["error", "error", "ok", "ok", "ok", "warning"]
    assert first == [list(pair) for pair in zip(words, order, strict=True)]
    assert out.splitlines()[3].split(None, 2)[2] == "1 error, 1 warning  LP204 not-in-the-file"
    assert "not run because no base (2 of 6 adapters): 1 rule (LP301)" in out
    assert "\ndeep/damaged-2\n" not in out
    assert err.endswith("hint: lora-probe check damaged\n")
    assert out.startswith("6 adapters: 3 without findings, 1 with warnings, 2 with errors; 2 errors, 3 warnings\n")


def test_the_findings_of_many_are_verbose(runs: Path, capsys: Any) -> None:
    short = call("check", "--recursive", capsys=capsys)[1]
    for option in ("-v", "--verbose"):
        status, out, err = call("check", "--recursive", option, capsys=capsys)
        assert status == 1
        assert out.splitlines()[:10] == short.splitlines()[:10]
        assert "\ndamaged\n  peft  90 of 90 modules take effect\n" in out
        assert "\nhealthy\n" not in out
        assert "\ndeep/damaged-2\n  the same findings as in damaged\n" in out
        assert "\nwarned\n  " in out
        assert out.count("error LP204 not-in-the-file: ") == 1
        assert err.endswith("hint: lora-probe rule LP204\n")
    # One adapter is shown in full anyway.
    assert call("check", "deep/healthy-9", "-v", capsys=capsys) == call("check", "deep/healthy-9", capsys=capsys)
    assert "no findings in deep/healthy-9/" in call("check", "--recursive", "deep/healthy-9", capsys=capsys)[1]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_paths_in_the_table_are_never_broken(
    width: int, runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    long = f"damaged-{'x' * 90}"
    (runs / long).mkdir()
    lines = call("check", "healthy", "damaged", capsys=capsys)[1].splitlines()[2:]
    assert [line.split()[:2] for line in lines if line.startswith(("ok", "error"))] == [
        ["ok", "healthy"],
        ["error", "damaged"],
    ]
    assert max(map(len, lines[:3])) <= width
    lines = call("check", long, "damaged", capsys=capsys)[1].splitlines()[2:]
    assert any(line.startswith(f"error    {long}  1 error" if width == 200 else f"error  {long}") for line in lines)
    if width == 80:
        assert lines[1] == "  1 error, 1 warning  LP204 not-in-the-file"


def test_a_refusal_is_explained_once(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "the file holds no tensors"

    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        for folder in adapters:
            ledgers = {name: Ledger(name, (), True, message, "LP209", predicted=True) for name in ("peft", "vllm")}
            yield replace(healthy(folder), ledgers=ledgers, diagnostics=(finding("LP209", message),))

    monkeypatch.setattr(checking, "check_all", check_all)
    out = call("check", "healthy", capsys=capsys)[1]
    assert "\npeft, vllm  refused by both (LP209)\n" in out
    assert out.count(message) == 1


def test_sentences_are_broken_at_spaces() -> None:
    long = "base_model.model.model.layers.0.self_attn.q_proj"
    made = wrapped(Text(f"  hint: one two three four {long} five six\n\nseven 八九十 eight nine"), 20).plain
    assert made.split("\n") == [
        "  hint: one two",
        "  three four",
        f"  {long}",
        "  five six",
        "",
        "seven 八九十 eight",
        "nine",
    ]


def test_what_was_printed_comes_before_what_is_said(tmp_path: Path) -> None:
    script = (
        "from lora_probe.render.console import complain, hint, note\n"
        "for say_so in (complain, hint, note):\n    print('data'); say_so('beside')"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout.split() == ["data", "error:", "beside", "data", "hint:", "beside", "data", "beside"]


@pytest.mark.slow
def test_a_narrow_terminal_and_no_colour(runs: Path) -> None:
    """In 60 columns no table is wider, and no sentence unless one word is."""
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import reports as t\n"
        "from pathlib import Path; from lora_probe.render.text.check import full_report\n"
        "from lora_probe.render.console import show\n"
        "show(full_report(t.damaged(Path('damaged'))))"
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
    assert max(map(len, plain.splitlines())) <= 60


def test_the_output_of_fix_and_diff(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    """For keys with a wrapper's name in them, which need no base."""
    wrapped = edited(adapter, tmp_path / "wrapped", lambda t: {f"module.{name}": tensor for name, tensor in t.items()})
    count = 6 * LAYERS
    status, out, _ = call("check", wrapped, "--diff", capsys=capsys)
    assert status == 0
    first = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    assert out.startswith(f"{count} keys: module. removed\n  -module.{first}\n  +{first}\n\n--- ")
    assert out.count("\n-module.") == count
    for form in ("sarif", "github"):
        for what in (["--diff"], ["--fix", "-o", tmp_path / "fixed"]):
            status, out, err = call("check", wrapped, *what, "--format", form, capsys=capsys)
            assert status == 2
            assert out.count("is not available for `check --") == 1
            assert "available formats: text, json" in err
    fixed = tmp_path / "fixed"
    status, out, _ = call("check", wrapped, "--fix", "-o", fixed, "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert data["adapter"] == str(fixed)
    assert data["mended"].keys() == {"folder", "renamed", "left", "converted", "not_copied"}
    assert data["mended"]["folder"] == str(fixed)
    assert len(data["mended"]["renamed"]) == count
    data = json.loads(call("check", fixed, "--fix", "-o", tmp_path / "2", "--format", "json", capsys=capsys)[1])
    assert (data["adapter"], data["mended"]["folder"], data["mended"]["renamed"]) == (str(fixed), None, {})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a.x.b.x.c", "a.b.c", "x. removed"),
        ("b.c", "a.b.c", "a. added"),
        ("language_model.model.b", "model.b", "language_model. removed"),
        ("a.lora_A.default.weight", "p.a.lora_A.weight", "p. added, default. removed"),
        ("a.b.c", "a.d.c", "b. became d."),
    ],
)
def test_changes_of_names_in_words(old: str, new: str, said: str) -> None:
    assert change(old, new) == said


def test_the_list_of_rules_is_by_families(capsys: Any) -> None:
    lines = call("rule", capsys=capsys)[1].splitlines()
    heads = [line for line in lines if re.match("LP.xx", line)]
    assert [head[:5] for head in heads] == [f"LP{number}xx" for number in range(1, 8)]
    assert heads[0] == "LP1xx: adapter_config.json  (reported by check)"
    assert heads[-1] == "LP7xx: merging  (reported by parity)"
    listed = [line.split()[0] for line in lines if re.match(r"LP\d\d\d", line)]
    assert listed == list(all_rules())
    assert len({line.index("severity") for line in lines if line.startswith("code ")}) == 1
