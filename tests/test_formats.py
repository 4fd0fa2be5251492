"""The registry of output formats, and formats of other distributions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from reports import made_up

from lora_probe.render import formats
from lora_probe.render.results import Paged
from lora_probe.render.spool import Spool

CSV = """
def findings(result):
    for report in result.reports:
        for diagnostic in report.diagnostics:
            yield f"{report.adapter},{diagnostic.code},{len(diagnostic.modules)}"

name, renderers = "tsv", {"check": findings}
"""
LEDGERS = """
from lora_probe.render.results import Paged

class Ledgers:
    name = "ledgers"
    def page(report, run):
        return {engine: len(ledger.rows) for engine, ledger in report.ledgers.items()}
    def whole(result):
        return {"adapters": result.run.adapters, "rows": list(result.pages)}
    renderers = {"check": Paged(page, whole)}
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made_up(tmp_path, monkeypatch)


def install(folder: Path, code: str, name: str = "my-formats", value: str = "tsv = my_formats") -> None:
    """A distribution with one module and one entry point, as an installer leaves it."""
    (folder / "my_formats.py").write_text(code)
    metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{formats.GROUP}]\n{value}\n")


@pytest.fixture
def installed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """`install` into a folder on the search path."""
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(folder))
    formats._installed.cache_clear()

    yield lambda *arguments, **options: install(folder, *arguments, **options)
    formats._installed.cache_clear()
    sys.modules.pop("my_formats", None)


def test_every_format_of_this_package_has_its_renderers() -> None:
    named = [(command, name) for command in formats.COMMANDS for name in formats.names_of(command)]
    assert len(named) > 40
    for renderers in (*formats.FORMATS.values(), formats.DOCUMENTS):
        assert renderers.keys() <= formats.COMMANDS
    for command, name in named:
        function = formats.renderer(command, name)
        assert callable(function) or isinstance(function, Paged)


def test_another_distribution_adds_a_format(runs: Path, installed: Callable[..., None], capsys: Any) -> None:
    installed(CSV)
    status, out, _ = call("check", "damaged", "healthy", "warned", "--format", "tsv", capsys=capsys)
    assert (status, out.splitlines()) == (1, ["damaged,LP204,3", "damaged,LP201,0", "warned,LP201,0"])
    status, out, _ = call("check", "--help", capsys=capsys)
    assert status == 0
    ours = formats.names_of("check")
    assert f"output format: {', '.join([*ours, 'tsv'])}" in " ".join(out.split())
    for arguments in (["inspect", "damaged"], ["rule"]):
        status, out, err = call(*arguments, "--format", "tsv", capsys=capsys)
        assert (status, out) == (2, "")
        assert "invalid choice: 'tsv'" in err
    status, out, err = call("check", "damaged", "--diff", "--format", "tsv", capsys=capsys)
    assert (status, out) == (2, "")
    assert "`--format tsv` is not available for `check --diff`" in err


def test_a_format_sees_the_ledgers_adapter_by_adapter(runs: Path, installed: Callable[..., None], capsys: Any) -> None:
    installed(LEDGERS, value="ledgers = my_formats:Ledgers")
    status, out, _ = call("check", "damaged", "healthy", "--format", "ledgers", capsys=capsys)
    assert status == 1
    assert json.loads(out) == {"adapters": 2, "rows": [{"peft": 90, "vllm": 90}] * 2}


@pytest.mark.parametrize(
    ("code", "value", "message"),
    [
        ("", "tsv = no_such_module", ": ModuleNotFoundError"),
        ("1 / 0", "tsv = my_formats", ": ZeroDivisionError"),
        ("", "tsv = my_formats:tsv", ": AttributeError"),
        ("name = 'tsv'", "tsv = my_formats", "a format needs a `name` and a mapping `renderers`"),
        ("name, renderers = 'tsv', {'chekc': print}", "tsv = my_formats", "maps `chekc` to"),
        ("name, renderers = 'tsv', {'check': 3}", "tsv = my_formats", "maps `check` to `3`"),
        ("name, renderers = 'tsv', {'check': lambda result: 1 / 0}", "tsv = my_formats", ": ZeroDivisionError"),
        (CSV.replace("diagnostic.code", "diagnostic.cod"), "tsv = my_formats", ": AttributeError"),
        (LEDGERS.replace('"ledgers"', '"tsv"').replace("len(", "len(1 + "), "tsv = my_formats:Ledgers", "TypeError"),
        ("name, renderers = 'sarif', {'check': print}", "tsv = my_formats", "`check` already has a format `sarif`"),
    ],
)
def test_a_broken_format_is_one_error_that_names_its_distribution(
    code: str, value: str, message: str, runs: Path, installed: Callable[..., None], capsys: Any
) -> None:
    installed(code, value=value)
    status, out, err = call("check", "damaged", "--format", "tsv", capsys=capsys)
    assert (status, out) == (2, "")
    assert err.count("error:") == 1
    assert f"the entry point `{value}` (lora_probe.formats) of the distribution `my-formats`" in err
    assert message in err
    assert "Traceback" not in err
    assert call("check", "damaged", "--format", "json", capsys=capsys)[0] == 1


def test_two_distributions_cannot_have_one_format(runs: Path, installed: Callable[..., None], capsys: Any) -> None:
    installed(CSV)
    installed(CSV, "other-formats")
    status, _, err = call("check", "damaged", "--format", "tsv", capsys=capsys)
    assert status == 2
    assert err.count("error:") == 1
    assert "`my-formats`" in err
    assert "`other-formats`" in err


def test_no_format_is_loaded_from_the_current_folder(tmp_path: Path) -> None:
    """It may be a stranger's checkout. The same distribution on the search path is loaded."""
    install(tmp_path, f"open({str(tmp_path / 'MARK')!r}, 'w').close()\n{CSV}")
    command = [sys.executable, "-m", "lora_probe", "check", "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "tsv" not in run.stdout
    assert not (tmp_path / "MARK").exists()
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=True
    )
    assert "tsv" in run.stdout


def test_pages_wait_on_disk() -> None:
    spool = Spool()
    pages: list[Any] = ["x\udcff\n" * 10, None, {"a": 1}, "y" * 2**25]
    for page in pages:
        spool.append(page)
    assert list(spool) == pages
    assert list(spool) == pages
