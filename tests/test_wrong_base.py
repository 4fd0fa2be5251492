"""An adapter on another base than its own: one finding that names both, and what is not one: names of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import LAYERS
from test_predictions import LIMIT, errors
from written import Tensors, edited, recorded_view, remember_answer, write_adapter, write_base

from lora_probe import check
from lora_probe.ledger import headline

HIDDEN = 128


def of_size(base: Path, hidden: int, layers: int) -> Path:
    """A base of another size: its config, and the engines' views of it, as they are for the recorded one."""
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps(config))
    for engine in ("peft", "vllm"):
        view = recorded_view("llama", engine)
        modules = {}
        for name, module in view.modules.items():
            shape = tuple(hidden if size == HIDDEN else size for size in module.shape) if module.shape else None
            for layer in range(layers) if ".layers.0." in name else ():
                modules[name.replace("layers.0", f"layers.{layer}")] = msgspec.structs.replace(module, shape=shape)
            if ".layers." not in name:
                modules[name] = msgspec.structs.replace(module, shape=shape)
        remember_answer(base, engine, msgspec.structs.replace(view, modules=modules))
    return base


@pytest.mark.parametrize("named", [True, False], ids=["the named base is here", "it is not"])
@pytest.mark.parametrize(("hidden", "layers"), [(96, 5), (192, 2), (96, LAYERS)])
def test_a_base_of_another_size_is_one_finding(hidden: int, layers: int, named: bool, tmp_path: Path) -> None:
    own = write_base(tmp_path / "own")
    other = of_size(write_base(tmp_path / "other"), hidden, layers)
    adapter = write_adapter(tmp_path / "a", own, target_modules=["q_proj", "v_proj", "down_proj"])
    if not named:
        edited(adapter, tmp_path / "b", config=lambda raw: raw | {"base_model_name_or_path": "org/own"})
    adapter, name = (adapter, str(own)) if named else (tmp_path / "b", "org/own")
    report = check(adapter, model=str(other), options=LIMIT)
    (diagnostic,) = report.diagnostics
    theirs, ours = f"hidden size {HIDDEN}", f"hidden size {hidden}"
    if layers != LAYERS:
        theirs, ours = f"{theirs}, {LAYERS} layers", f"{ours} and {layers} layers"
    assert (diagnostic.code, diagnostic.message) == (
        "LP301",
        f"trained on `{name}` ({theirs}), but `{other}` has {ours}",
    )
    assert diagnostic.hint == f"pass the base model that adapter_config.json names: --model {name}"
    assert {
        row.stations[station].code
        for ledger in report.ledgers.values()
        for row in ledger.rows
        for station in row.stations
    } <= {"", "LP301"}
    # The hint is followed.
    if named:
        assert check(adapter, model=name, options=LIMIT).diagnostics == ()


def test_a_base_with_other_layers_is_known_by_the_one_that_is_named(tmp_path: Path) -> None:
    own, other = write_base(tmp_path / "own"), of_size(write_base(tmp_path / "other"), HIDDEN, LAYERS + 2)
    adapter = write_adapter(tmp_path / "a", own)
    (diagnostic,) = check(adapter, model=str(other), options=LIMIT).diagnostics
    assert diagnostic.message == f"trained on `{own}` (3 layers), but `{other}` has 5 layers"
    unnamed = edited(adapter, tmp_path / "b", config=lambda raw: raw | {"base_model_name_or_path": "org/own"})
    assert errors(check(unnamed, model=str(other), options=LIMIT)) == {"LP204"}


def test_the_base_in_the_config_is_the_wrong_one(tmp_path: Path) -> None:
    other = of_size(write_base(tmp_path / "other"), 96, LAYERS)
    adapter = write_adapter(tmp_path / "a", write_base(tmp_path / "own"))
    changed = edited(adapter, tmp_path / "b", config=lambda raw: raw | {"base_model_name_or_path": str(other)})
    for model in (None, str(other)):
        (diagnostic,) = check(changed, model=model, options=LIMIT).diagnostics
        assert diagnostic.message == (
            f"trained on another base model (hidden size {HIDDEN}), but `{other}` has hidden size 96"
        )
        assert diagnostic.hint.endswith("adapter_config.json names another one")


def test_one_projection_that_differs_is_enough(tmp_path: Path) -> None:
    """Models of one hidden size may have another number of heads for keys and values."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base, target_modules=["q_proj", "v_proj"])

    def wider(tensors: Tensors) -> Tensors:
        return {n: np.tile(t, (2, 1)) if "v_proj.lora_B" in n else t for n, t in tensors.items()}

    (diagnostic,) = check(edited(adapter, tmp_path / "b", wider), model=str(base), options=LIMIT).diagnostics
    assert diagnostic.code == "LP301"
    assert diagnostic.message == (
        f"trained on another base model, not on `{base}`: layer 0 v_proj: "
        "lora_B has 128 outputs, the base model's weight has 64"
    )


def test_one_damaged_pair_is_not_another_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base)

    def cut(tensors: Tensors) -> Tensors:
        return {n: t[:-8] if "layers.1.self_attn.v_proj.lora_B" in n else t for n, t in tensors.items()}

    (diagnostic,) = check(edited(adapter, tmp_path / "b", cut), model=str(base), options=LIMIT).diagnostics
    assert diagnostic.code == "LP301"
    assert "trained on" not in diagnostic.message


def test_a_base_of_another_class_is_one_finding(tmp_path: Path) -> None:
    own, other = write_base(tmp_path / "own", "gpt2"), write_base(tmp_path / "other")
    adapter = write_adapter(tmp_path / "a", own, target_modules=["c_attn"], fan_in_fan_out=True)
    report = check(adapter, model=str(other), options=LIMIT)
    (diagnostic,) = report.diagnostics
    assert (diagnostic.code, diagnostic.message) == (
        "LP301",
        f"trained on `{own}`, not on `{other}`: its modules (`c_attn`) are not in `{other}`",
    )
    assert all(ledger.refused for ledger in report.ledgers.values())


ID, NAMES = "Qwen/Qwen2.5-0.5B-Instruct", "base_model_name_or_path"


@pytest.mark.parametrize(
    ("wanted", "folder", "reported"),
    [
        (ID, "qwen", True),
        ("/root/models/my-base", "qwen", True),
        (ID, "Qwen2.5-0.5B-Instruct", False),
        (ID, "models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/abc", False),
        ("/root/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/def", "Qwen2.5-0.5B-Instruct", False),
        ("unsloth/qwen2.5-0.5b-instruct-unsloth-bnb-4bit", "Qwen2.5-0.5B-Instruct", False),
        (None, "qwen", False),
    ],
)
def test_another_name_is_an_information(wanted: str | None, folder: str, reported: bool, tmp_path: Path) -> None:
    (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
    base = write_base(tmp_path / folder)
    adapter = write_adapter(tmp_path / "a", base, **{NAMES: wanted})
    report = check(adapter, model=str(base), options=LIMIT)
    names = [one for one in report.diagnostics if one.code == "LP318"]
    assert len(names) == reported
    assert report.clean
    for diagnostic in names:
        assert diagnostic.severity == "info"
        assert f"`{wanted}`" in diagnostic.message
        assert f"`{base}`" in diagnostic.message


def test_a_config_that_differs_is_a_warning(tmp_path: Path) -> None:
    own = write_base(tmp_path / "own", intermediate_size=512)
    other = write_base(tmp_path / "other")
    (diagnostic,) = check(write_adapter(tmp_path / "a", own), model=str(other), options=LIMIT).diagnostics
    assert (diagnostic.code, diagnostic.severity) == ("LP312", "warning")
    assert "intermediate_size 512" in diagnostic.message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({NAMES: None}, "adapter_config.json does not name a base model"),
        ({NAMES: "org/absent"}, "base model `org/absent` was not found"),
    ],
)
def test_why_there_is_no_base(changes: dict[str, Any], why: str, adapter: Path, tmp_path: Path) -> None:
    report = check(edited(adapter, tmp_path / "a", config=lambda raw: raw | changes))
    assert [skipped.why for skipped in report.not_run] == [why]
    assert all(headline(ledger).endswith(f"effect unknown because {why}") for ledger in report.ledgers.values())


def test_a_base_that_cannot_be_read_is_not_an_absent_one(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text("{")
    report = check(edited(adapter, tmp_path / "a", config=lambda raw: raw | {NAMES: str(base)}))
    assert [skipped.why for skipped in report.not_run] == [f"base model `{base}` cannot be read"]
