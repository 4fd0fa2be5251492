"""Another distribution (`tests/plugin`) adds rules, an engine and its predictor, and every command shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import record_peft, save_adapter

from lora_probe import open_trace
from lora_probe.render.formats import names_of

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the distribution in it. It is built from a copy: building leaves files behind."""
    return install(PLUGIN, tmp_path_factory.mktemp("plugin"))


def install(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="session")
def padded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank that is padded, and a projection that `example` does not adapt."""
    folder = tmp_path_factory.mktemp("padded") / "padded"
    return save_adapter(folder, llama, r=6, target_modules=["q_proj", "o_proj"])


def run(installed: Path, *arguments: object, status: int, cwd: Path | None = None) -> str:
    """`lora-probe` in a process of its own, with the distribution on its path. Returns standard output."""
    done = call(installed, *arguments, cwd=cwd)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def call(installed: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-P", "-m", "lora_probe", *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": path, "COLUMNS": "120"}
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, check=False)


def by_code(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {diagnostic["code"]: diagnostic for diagnostic in report["diagnostics"]}


def test_check_predicts_a_third_engine(installed: Path, padded: Path, llama: Path) -> None:
    report = json.loads(run(installed, "check", padded, "--model", llama, "--format", "json", status=1))
    assert list(report["ledger"]) == ["peft", "vllm", "example"]
    assert {engine: ledger["took_effect"] for engine, ledger in report["ledger"].items()} == {
        "peft": 6,
        "vllm": 6,
        "example": 3,
    }
    found = by_code(report)
    assert found.keys() == {"EX101", "EX201"}
    assert found["EX101"]["severity"] == "warning"
    assert found["EX101"]["line"] is not None
    assert found["EX201"]["engines"] == ["example"]
    # It states what LP410 would: that the engines differ.
    assert found["EX201"]["message"].endswith("; these modules take effect in PEFT and vLLM")


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        (["--select", "EX"], {"EX101", "EX201"}),
        (["--select", "ex2xx,rank-is-padded"], {"EX101", "EX201"}),
        (["--ignore", "EX101,EX2"], {"LP410"}),
        (["--select", "LP4"], {"LP410"}),
    ],
)
def test_rules_are_selected(options: list[str], codes: set[str], installed: Path, padded: Path, llama: Path) -> None:
    command = ["check", padded, "--model", llama, "--exit-zero", "--format", "json", *options]
    assert by_code(json.loads(run(installed, *command, status=0))).keys() == codes


def test_every_format_of_check_shows_its_findings(installed: Path, padded: Path, llama: Path) -> None:
    for form in ("text", "sarif", "github", "csv", "tsv"):
        shown = run(installed, "check", padded, "--model", llama, "--exit-zero", "--format", form, status=0)
        assert "EX101" in shown, form
        assert "`o_proj` is not adapted" in shown, form
    log = json.loads(run(installed, "check", padded, "--model", llama, "--exit-zero", "--format", "sarif", status=0))
    assert {"EX101", "EX201"} <= {rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]}
    done = call(installed, "check", padded, "--select", "EX9")
    assert done.returncode == 2
    assert "101, 201 after EX" in " ".join(done.stderr.split())


def test_its_format_is_listed_and_shows_traces(installed: Path, tmp_path: Path) -> None:
    assert re.search(
        ", ".join([*names_of("show"), "tsv"]),
        " ".join(run(installed, "show", "--help", status=0).split()),
    )
    recorded = Path(__file__).parent / "data" / "schema-1.lptrace"
    lines = run(installed, "show", recorded, "--format", "tsv", status=0).splitlines()
    assert lines[0] == "load\tmodule\tfate"
    assert "0\tmodel.layers.0.self_attn.k_proj\ttook effect" in lines


def test_rule_explains_its_rules(installed: Path) -> None:
    assert run(installed, "rule", "EX101", status=0).startswith("EX101 rank-is-padded")
    assert "EX2xx" in run(installed, "rule", status=0)
    assert "### EX201 projection-not-adapted" in run(installed, "rule", "--format", "markdown", status=0)
    family = json.loads(run(installed, "rule", "EX", "--format", "json", status=0))["rules"]
    assert [(rule["code"], rule["engines"]) for rule in family] == [("EX101", ["example"]), ("EX201", ["example"])]
    (ours,) = json.loads(run(installed, "rule", "LP203", "--format", "json", status=0))["rules"]
    assert ours["engines"] == ["peft", "vllm", "example"]


def test_the_engine_runs_and_compares(installed: Path, padded: Path, llama: Path, tmp_path: Path) -> None:
    peft = record_peft(padded, llama, tmp_path / "peft.lptrace").path
    options = ["--engine", "example", "--model", llama]
    shown = run(installed, "trace", padded, *options, "--follow", peft, "-o", "example.lptrace", status=1, cwd=tmp_path)
    assert "3 of 6 modules took effect, 3 lost at placed" in " ".join(shown.split())
    shown = run(installed, "show", "example.lptrace", "--format", "json", status=1, cwd=tmp_path)
    ledger = json.loads(shown)["ledger"]["example"]
    predicted = json.loads(run(installed, "check", padded, "--model", llama, "--format", "json", status=1))
    for measured, module in zip(ledger["modules"], predicted["ledger"]["example"]["modules"], strict=True):
        assert (measured["module"], measured["fate"]) == (module["module"], module["fate"])
        assert measured["reason"] == module["reason"]
    assert ledger["modules"][0]["stations"]["agrees"] == "ok"
    shown = run(installed, "compare", peft, "example.lptrace", "--format", "json", status=1, cwd=tmp_path)
    statuses = {module["module"]: module["status"] for module in json.loads(shown)["modules"]}
    # What it multiplies is right in the first layer alone: there both engines have computed the same.
    for layer, status in ((0, "ok"), (1, "differs"), (2, "differs")):
        assert statuses[f"model.layers.{layer}.self_attn.q_proj"] == status
        assert statuses[f"model.layers.{layer}.self_attn.o_proj"] == "only in reference"
    run(installed, "trace", padded, *options, "-o", "own.lptrace", "--prompt", "Who?", status=1, cwd=tmp_path)
    assert len(open_trace(tmp_path / "own.lptrace").requests[0].prompt_ids) == len("Who?")


def test_it_refuses_what_does_not_fit(installed: Path, padded: Path, qwen2: Path, tmp_path: Path) -> None:
    done = call(installed, "trace", padded, "--engine", "example", "--model", qwen2, "--", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "example accepts no engine flags" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_engine_without_a_predictor_is_not_predicted(padded: Path, llama: Path, tmp_path: Path) -> None:
    site = install(altered(tmp_path, "predictors", ""), tmp_path / "made")
    report = json.loads(run(site, "check", padded, "--model", llama, "--format", "json", status=0))
    assert list(report["ledger"]) == ["peft", "vllm"]
    assert by_code(report).keys() == {"EX101"}
    run(site, "trace", padded, "--engine", "example", "--model", llama, "-o", tmp_path / "t", status=1)
    assert "3 of 6 modules took effect" in run(site, "show", tmp_path / "t", status=1)


def test_a_predictor_without_an_engine_predicts_from_headers(padded: Path, llama: Path, tmp_path: Path) -> None:
    site = install(altered(tmp_path, "engines", ""), tmp_path / "made")
    report = json.loads(run(site, "check", padded, "--model", llama, "--format", "json", status=1))
    assert report["ledger"]["example"]["took_effect"] == 3
    assert "example did not describe the base (the engine `example` is not installed)" in report["notes"][0]
    done = call(site, "trace", padded, "--engine", "example", "--model", llama)
    assert done.returncode == 2
    assert "pip install lora-probe-example" in done.stderr


def altered(folder: Path, group: str, entry: str) -> Path:
    """The distribution with another entry point in one group, or none there."""
    source = folder / "altered"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    settings = (source / "setup.cfg").read_text()
    (wanted,) = re.findall(rf"^lora_probe\.{group} =\n(.*)\n", settings, re.MULTILINE)
    (source / "setup.cfg").write_text(settings.replace(wanted, entry))
    return source


@pytest.mark.parametrize(
    ("group", "value", "command", "why"),
    [
        ("rules", "no_such_module", ["rule"], "ModuleNotFoundError: No module named 'no_such_module'"),
        ("rules", "lora_probe_example.broken", ["check", "."], "ZeroDivisionError: division by zero"),
        ("rules", "lora_probe_example.ours", ["rule"], "`LP999` is not a code for its rules"),
        ("predictors", "lora_probe_example.rules:ADAPTED", ["check", "."], "expected a `Predictor`, got `tuple`"),
        ("engines", "lora_probe_example.rules:ADAPTED", ["trace", ".", "--engine", "bad"], "it has no method `record`"),
    ],
)
def test_a_broken_entry_point_is_one_clear_error(
    group: str, value: str, command: list[str], why: str, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    source = altered(tmp_path, group, f"    bad = {value}")
    (source / "lora_probe_example" / "broken.py").write_text("1 / 0\n")
    (source / "lora_probe_example" / "ours.py").write_text(
        "from lora_probe.rules import rule\nrule('LP999', 'x', 'stored', 'wrong', hint='')(lambda: 'x')\n"
    )
    done = call(install(source, tmp_path / "made"), *command, cwd=adapter)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert why in message
    assert f"the entry point `bad = {value}`" in message
    assert "`lora-probe-example`" in message
    assert "Traceback" not in done.stderr


def test_two_distributions_cannot_have_one_name(adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        folder = tmp_path / "site" / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[lora_probe.engines]\nsame = {name}:Engine\n")
    done = call(tmp_path / "site", "trace", adapter, "--engine", "same", cwd=tmp_path)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert "clashes with the entry point" in message
    assert "`one`" in message
    assert "`other`" in message
