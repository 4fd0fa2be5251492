"""`inspect --module`: which module is selected, and what is shown about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import edited, save_adapter
from safetensors.numpy import load_file, save_file

from lora_probe import inspect
from lora_probe.adapter.one_module import find, select
from lora_probe.cli.main import main
from lora_probe.errors import ProbeError

NAME = "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.mark.parametrize(
    "name",
    [NAME, "layers.1.self_attn.q_proj", "1.self_attn.q_proj", PREFIX + NAME, f"{PREFIX}{NAME}.lora_A.weight"],
)
def test_a_module_by_the_end_of_its_path(adapter: Path, name: str) -> None:
    assert find(inspect(adapter), name).module == NAME


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("q_proj", "`q_proj` matches 3 modules", "pass one of: model.layers.0.self_attn.q_proj, model.layers.1."),
        ("1.self_attn.o_proj", "no module in", "try one of: model.layers.1.self_attn."),
        ("f_attn.q_proj", "no module in", "try one of: model.layers."),
        ("", "no module in", ""),
        ("\x1b[31mq" + "x" * 500, r"ends in `\x1b[31mqxxx", "try one of"),
    ],
)
def test_no_module_and_several(adapter: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(ProbeError) as caught:
        find(inspect(adapter), name)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2
    assert caught.value.message.isprintable()


def test_a_whole_parameter_is_no_module(llama: Path, tmp_path: Path) -> None:
    found = inspect(save_adapter(tmp_path / "a", llama, modules_to_save=["lm_head"]))
    with pytest.raises(ProbeError, match=r"`lm_head` is in .*not as lora_A and lora_B: a whole parameter"):
        find(found, "lm_head")


def test_fused_experts_are_named_by_their_parameter(tmp_path: Path) -> None:
    home = "base_model.model.model.layers.0.mlp.experts"
    names = [f"{home}{inner}.lora_{half}.weight" for inner in ("", ".base_layer") for half in "AB"]
    tensors = {name: np.ones((4, 4), np.float32) for name in names}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert find(found, "experts.down_proj").parameter == "down_proj"
    assert find(found, "0.mlp.experts.gate_up_proj").parameter == "gate_up_proj"
    with pytest.raises(ProbeError, match="matches 2 modules"):
        find(found, "mlp.experts")


def test_its_values(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{NAME}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    found = select(inspect(adapter), NAME)
    assert found.spectrum is not None
    np.testing.assert_allclose(found.spectrum.singular, np.linalg.svd(2 * b @ a, compute_uv=False)[:8], rtol=1e-5)
    assert [values.norm for values in found.tensors] == [
        pytest.approx(np.linalg.norm(a)),
        pytest.approx(np.linalg.norm(b)),
    ]
    for values, tensor in zip(found.tensors, (a, b), strict=True):
        np.testing.assert_array_equal(values.corner, tensor[:4, :6].astype(np.float32))


def test_text_and_json(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--module", NAME]) == 0
    out = capsys.readouterr().out
    for words in (
        f"module   {NAME}",
        "scaling  2 (alpha / r, from the config)",
        "all 8",
        "its first 4 × 6 values",
        "8×128",
    ):
        assert words in out
    assert main(["inspect", str(adapter), "--module", NAME, "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (module,) = data["modules"]
    assert (module["module"], module["rank"], module["config_rank"], module["scaling"]) == (NAME, 8, 8, 2.0)
    assert len(module["singular_values"]) == 8
    assert [len(values["corner"]) for values in module["values"]] == [4, 4]
    assert main(["inspect", str(adapter), "--module", "q_proj"]) == 2
    assert "pass one of" in capsys.readouterr().err


def test_what_is_no_number_and_what_is_missing(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = f"{PREFIX}{NAME}.lora_A.weight"
    nan = edited(adapter, tmp_path / "nan", lambda t: t | {half: t[half] * float("nan")})
    gone = edited(adapter, tmp_path / "gone", lambda t: {n: v for n, v in t.items() if n != half})
    words = (
        (nan, "not finite: A or B contains NaN or infinity"),
        (gone, "lora_A is not in the file"),
    )
    for folder, said in words:
        assert main(["inspect", str(folder), "--module", NAME]) == 0
        assert said in capsys.readouterr().out
        assert main(["inspect", str(folder), "--module", NAME, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["modules"][0]["norm"] is None
