"""The recorded answers of engines in tests/data are those of the installed engines: recorded again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from record_views import DATA, record

pytestmark = pytest.mark.engine
STALE = "the engines answer otherwise than when tests/data was recorded: look at the difference, and record it again"
VERSIONS = ("transformers_version", "peft_version")
"""Another version alone is no other answer."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    return folder


def files(folder: Path) -> set[str]:
    """What `record_views.py` writes. The trace of an earlier version cannot be recorded again."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.parts[0] not in ("outcomes.json", "schema-1.lptrace")}


def test_the_same_is_recorded(recorded: Path) -> None:
    assert files(recorded) == files(DATA)


@pytest.mark.parametrize("name", sorted(files(DATA)))
def test_a_recording_is_not_stale(name: str, recorded: Path) -> None:
    assert content(recorded / name) == content(DATA / name), STALE


def content(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_text()
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        return found
    plain = {key: value for key, value in found.items() if key not in VERSIONS}
    if path.name == "adapter_config.json":
        # PEFT keeps targets as a set.
        plain["target_modules"] = sorted(plain["target_modules"])
    return plain
