"""Tables at several widths: nothing is broken inside a word, and no module is without a name of its own."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from safetensors.numpy import load_file, save_file
from test_names import BERT, LLAMA, MOE, T5, UNET, WHISPER

from lora_probe.cli.main import NAMES, command_of
from lora_probe.cli.options import _narrow
from lora_probe.names import Universe, name_modules

WIDTHS = (60, 80, 120, 200)


def write(folder: Path, modules: list[str], **config: Any) -> Path:
    """An adapter of these modules, without a base."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    tensors = {}
    for module in modules:
        for half, shape in (("A", (2, 8)), ("B", (16, 2))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = numbers.normal(size=shape).astype("f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", [LLAMA, UNET, WHISPER, T5, MOE, BERT], ids=lambda family: family[0])
def test_norms_fit_the_width(
    family: list[str], width: int, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(write(tmp_path / "a", family))
    status, out, _ = call("inspect", ".", "--norms", capsys=capsys)
    assert status == 0
    # The verdict is a sentence, which a pipe gets whole.
    assert max(map(len, out.splitlines()[1:])) <= width
    printed = set(re.split("[\\s,:]+", out))
    assert printed >= {"modules", "layers", "A", "B", "rank", "scaling", "dtype"}
    universe = Universe(tuple(family))
    for path in family:
        assert printed >= set(name_modules([path], universe).split()) - {"0", "1", "2"}, path
    # A number and a rank for each module, and nothing else.
    norms = out[out.index("‖ΔW‖") : out.index("projection" if "projection" in out else "modules: ")]
    assert len(re.findall(r"\br\b", norms)) == len(family) + 1


def test_a_module_has_a_row_of_its_own_where_columns_are_too_narrow(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "a", [*WHISPER, "proj_out"]))
    wide = norms(capsys)
    assert wide[0].split() == ["decoder", "layer", "self_attn.q_proj", "encoder_attn.q_proj", "fc1"]
    assert wide[4].split() == ["encoder", "layer", "q_proj", "fc1"]
    assert [line.split()[0] for line in wide[1:4]] == ["0", "1", "2"]
    assert wide[8].split()[:1] == ["module"]
    assert wide[9].split()[:1] == ["proj_out"]
    monkeypatch.setenv("COLUMNS", "50")
    narrow = norms(capsys)
    assert "decoder layer 2 encoder_attn.q_proj" in [line[:35] for line in narrow]
    # A row for each module of the decoder; the encoder, with fewer projections, keeps its columns.
    assert len(narrow) == 1 + 9 + len(wide[4:])


def norms(capsys: Any) -> list[str]:
    out: str = call("inspect", ".", "--norms", capsys=capsys)[1]
    return out[out.index("‖ΔW‖") :].partition("\n\n")[0].splitlines()[1:]


def test_sentences_of_rules_have_room(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = call("rule", "LP2", capsys=capsys)[1].splitlines()
    assert lines[1] == "LP201"
    assert lines[2].startswith("  name: rank-differs-from-config, station: stored, ")
    assert max(map(len, lines)) <= 64
    monkeypatch.setenv("COLUMNS", "100")
    assert call("rule", "LP2", capsys=capsys)[1].splitlines()[1].split() == [
        "code",
        "name",
        "station",
        "severity",
        "reports",
    ]


@pytest.mark.parametrize("command", NAMES)
def test_examples_fit_a_narrow_terminal(command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = call(command, "--help", capsys=capsys)[1]
    examples = re.sub("\x1b[^m]*m", "", out[out.index("examples:") :]).splitlines()[1:]
    assert max(map(len, examples)) <= 60
    joined = re.sub(r" \\\n +", " ", "\n".join(examples))
    assert joined.splitlines() == command_of(command).examples.splitlines()


def test_a_broken_example_is_the_same_command() -> None:
    example = "  lora-probe trace ckpt/ --engine vllm --dtype float32 --prompt 'Who are you, and why?' -o run.lptrace"
    echo = _narrow(example).replace("lora-probe", "printf '%s|'")
    run = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True).stdout
    assert run.split("|")[-4:] == ["Who are you, and why?", "-o", "run.lptrace", ""]
    assert _narrow("  lora-probe env") == "  lora-probe env"


@pytest.mark.parametrize(("bias", "count"), [("all", 3), ("lora_only", 1)])
def test_trained_biases_are_called_so(bias: str, count: int, tmp_path: Path, capsys: Any) -> None:
    """PEFT stores the bias of an adapted layer under `base_layer`, and other ones under their own names."""
    modules = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]
    folder = write(tmp_path / "a", modules, bias=bias, modules_to_save=["classifier"], task_type="SEQ_CLS")
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = [f"{modules[0]}.base_layer.bias", "bert.pooler.dense.bias", "bert.encoder.layer.0.output.dense.bias"]
    head = ["classifier.weight", "classifier.bias"]
    for name in [*stored[:count], *head]:
        tensors[f"base_model.model.{name}"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    others = json.loads(call("inspect", folder, "--format", "json", capsys=capsys)[1])["others"]
    what = {other["name"].removeprefix("base_model.model."): other["what"] for other in others}
    assert what == dict.fromkeys(stored[:count], f"a trained bias (bias: {bias})") | dict.fromkeys(
        head, "a whole parameter (modules_to_save)"
    )
