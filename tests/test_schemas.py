"""Every JSON output has a schema in the package, and is as it says. `conftest.call` validates outputs of all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import call
from json_schemas import FOLDER, name_of, validator
from served import A, B, mixed
from test_compare_runs import record

OUTPUTS = {
    *("inspect", "inspect-module", "inspect-pair", "check", "check-many", "check-diff", "trace", "show-module"),
    *("attach", "compare", "compare-adapters", "parity", "rule", "env", "error"),
    *("cost", "show-benchmark"),
}


def test_every_output_has_one() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == OUTPUTS
    for name in OUTPUTS:
        schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "schema_version" in schema["required"], name


def test_outputs_are_as_their_schemas_have_them(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    """`call` validates them; here is one of each that needs no engine."""
    run, answered = mixed(tmp_path / "run", A, B), record(tmp_path / "answered")
    commands: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", adapter, "--norms"),
        "inspect-module": ("inspect", adapter, "--module", "layers.0.self_attn.q_proj"),
        "inspect-pair": ("inspect", adapter, adapter),
        "check": ("check", adapter, "--engine", "peft"),
        "check-many": ("check", adapter, "--recursive", "--engine", "peft"),
        "trace": ("show", run),
        "compare": ("compare", answered, answered),
        "rule": ("rule", "LP204"),
        "env": ("env",),
        "error": ("show", tmp_path / "none"),
    }
    for name, words in commands.items():
        out = call(*words, "--format", "json", capsys=capsys)[1]
        assert name_of([str(word) for word in words], json.loads(out)) == name


def test_a_missing_field_is_noticed() -> None:
    with pytest.raises(jsonschema.ValidationError, match="'verdict' is a required property"):
        validator("compare").validate({"schema_version": 1})
