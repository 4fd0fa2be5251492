"""Which files of a folder are an adapter, and the errors if they are not: the config, the weights, a pickle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, TARGETS, record_peft
from merges import merge_by_peft, save_adapter_of, save_model

from lora_probe import inspect
from lora_probe.adapter import open_config
from lora_probe.cli.main import main
from lora_probe.errors import MissingWeights, NotLora, UnreadableFile
from lora_probe.ledger import headline
from lora_probe.merging.parity import parity

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def as_pickle(source: Path, target: Path, name: str = PICKLE, legacy: bool = False) -> Path:
    """A copy of an adapter with its weights pickled by torch, as PEFT before 0.5 wrote them, under PEFT's names."""
    shutil.copytree(source, target)
    import torch
    from safetensors.torch import load_file

    tensors = load_file(target / WEIGHTS)
    (target / WEIGHTS).unlink()
    torch.save(tensors, target / name, _use_new_zipfile_serialization=not legacy)
    return target


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_is_read_as_safetensors_are(adapter: Path, tmp_path: Path, legacy: bool) -> None:
    one, two = inspect(adapter), inspect(as_pickle(adapter, tmp_path / "bin", legacy=legacy))
    assert [m.key for m in one.modules] == [m.key for m in two.modules]
    assert (one.parameters, one.dtypes) == (two.parameters, two.dtypes)
    assert PICKLE not in two.files
    assert len(two.digest()) == len(one.digest())
    assert two.digest() != one.digest()
    for a, b in zip(one.modules, two.modules, strict=True):
        for left, right in zip(a.tensors, b.tensors, strict=True):
            assert (left.name, left.shape, left.dtype) == (right.name, right.shape, right.dtype)
            values = two.values(right)
            np.testing.assert_array_equal(one.values(left), values)
            values += 1
            np.testing.assert_array_equal(one.values(left), two.values(right))


def test_a_bin_as_peft_itself_writes_it(llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin" / WEIGHTS).exists()
    assert [module.rank for module in inspect(tmp_path / "bin").modules] == [4, 4, 4]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_is_traced(adapter: Path, llama: Path, tmp_path: Path, legacy: bool) -> None:
    trace = record_peft(as_pickle(adapter, tmp_path / "bin", legacy=legacy), llama, tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{3 * LAYERS} of {3 * LAYERS} modules took effect"


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_merge_is_checked_against_a_bin(tmp_path: Path, more: dict[str, Any]) -> None:
    base = save_model(tmp_path / "base", "llama")
    made = save_adapter_of(tmp_path / "adapter", base, target_modules=list(TARGETS), **more)
    merged = merge_by_peft(tmp_path / "merged", made, base, "float32")
    found = parity(as_pickle(made, tmp_path / "bin"), model=str(base), merged=str(merged), weights_only=True)
    assert found.verdict == "verified"
    assert (
        found.weights.compared == parity(made, model=str(base), merged=str(merged), weights_only=True).weights.compared
    )


def test_a_bin_on_the_command_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_pickle(adapter, tmp_path / "bin")
    for arguments in ([], ["--norms"], ["--module", "1.self_attn.q_proj"]):
        outputs = []
        for one in (adapter, folder):
            assert main(["inspect", str(one), *arguments, "--format", "json"]) == 0
            data = json.loads(capsys.readouterr().out)
            outputs.append({key: data[key] for key in ("modules", "parameters", "dtypes", "others")})
        assert outputs[0] == outputs[1]


def test_a_bin_without_torch(adapter: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from lora_probe.cli.main import main\n"
        f"sys.exit(main(['inspect', {str(as_pickle(adapter, tmp_path / 'bin'))!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is a pickle, which needs torch, and torch is not installed" in done.stderr
    assert "pip install 'lora-probe[peft]'" in done.stderr


def test_which_file_is_read(adapter: Path, tmp_path: Path) -> None:
    folder = as_pickle(adapter, tmp_path / "a")
    shutil.copy(adapter / WEIGHTS, folder)
    found = inspect(folder)
    assert found.weights.path.name == WEIGHTS
    assert found.notes == (f"{PICKLE} is ignored: loaders read {WEIGHTS} first",)
    found = inspect(as_pickle(adapter, tmp_path / "pt", "adapter_model.pt"))
    assert found.weights.path.name == "adapter_model.pt"
    assert found.notes == (f"only vLLM reads adapter_model.pt; PEFT looks for {WEIGHTS} and {PICKLE}",)


def renamed(adapter: Path, target: Path, *names: str) -> Path:
    shutil.copytree(adapter, target)
    data = (target / WEIGHTS).read_bytes()
    (target / WEIGHTS).unlink()
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["sft/" + WEIGHTS], "the weights are in the subfolder sft, where no loader looks", "move the weights out of"),
        (
            ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"],
            "the weights are in shards (adapter_model-00001-of-00002.safetensors, adapter_model-00002-of-00002",
            f"merge their tensors into one file, {WEIGHTS}",
        ),
        (["adapter_model-00001-of-00001.safetensors"], "in shards", f"rename it to {WEIGHTS}"),
        (
            ["adapter_model (5).bin"],
            "looks for adapter_model (5).bin, named like a duplicate download",
            f"rename it to {PICKLE}",
        ),
        (["adapter_model(1).safetensors"], "named like a duplicate download or a copy", f"rename it to {WEIGHTS}"),
        (["adapter_model copy.safetensors", "adapter_model (1).safetensors"], "or a copy", "there are 2 copies"),
        (["adapters.safetensors"], "adapters.safetensors, MLX's name", "convert it"),
        (["model.safetensors"], "the name of a whole model", "merged model"),
        (["lora.safetensors"], "no loader looks for lora.safetensors", f"rename lora.safetensors to {WEIGHTS}"),
        (["lora.pt"], "no loader looks for lora.pt", f"rename lora.pt to {PICKLE}"),
        (["training_args.bin", "optimizer.pt"], "no other file that could be weights", "save or download"),
        ([], "no other file that could be weights", "save or download"),
    ],
)
def test_weights_where_no_loader_looks(
    adapter: Path, tmp_path: Path, names: list[str], message: str, hint: str
) -> None:
    folder = renamed(adapter, tmp_path / "a", *names)
    with pytest.raises(MissingWeights) as caught:
        inspect(folder)
    assert caught.value.message.startswith(f"`{folder}` holds adapter_config.json but no {WEIGHTS}")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_whole_adapter_in_a_sub_folder_is_pointed_at(adapter: Path, tmp_path: Path) -> None:
    folder = renamed(adapter, tmp_path / "a")
    shutil.copytree(adapter, folder / "sft")
    with pytest.raises(MissingWeights) as caught:
        inspect(folder)
    assert caught.value.hint == f"pass `{folder / 'sft'}`"


def test_weights_without_a_config(adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / WEIGHTS, tmp_path)
    with pytest.raises(UnreadableFile, match=f"holds {WEIGHTS} but no adapter_config.json") as caught:
        inspect(tmp_path)
    assert "copy adapter_config.json" in caught.value.hint
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnreadableFile, match="is the folder of a model, not of an adapter"):
        inspect(tmp_path)


MODEL = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8, "vocab_size": 9}
HUB = {"config": {"architecture": "lora", "r": 8, "alpha": 16}, "hidden_size": 8, "model_class": "BertAdapterModel"}
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}, "of an MLX adapter"),
    ({"lora_parameters": {"rank": 8}}, "of an MLX adapter"),
    (HUB, "an AdapterHub adapter (architecture 'lora')"),
    ({"config": "pfeiffer", "model_name": "bert", "hidden_size": 8, "name": "a"}, "architecture 'pfeiffer'"),
    (MODEL, "of a whole model (Qwen2ForCausalLM)"),
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20}, "a PREFIX_TUNING adapter, not LoRA: prefix tuning"),
    ({"peft_type": "IA3"}, "describes a IA3 adapter, not LoRA"),
    ({"peft_type": "GRALORA"}, "another PEFT method"),
    ({"peft_type": "HOMEMADE"}, "PEFT 0.21 has no such method"),
    ({"peft_type": "lora", "r": 8}, "which PEFT does not accept: it must be LORA"),
    ({"peft_type": ["LORA"]}, "which is not a PEFT method"),
    ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}, "of an image model's LoRA"),
    ({"network_module": "networks.lora", "network_dim": 32}, "of an image model's LoRA"),
    ({"jax_dtype": "bfloat16", "lora_rank": 8}, "made with JAX"),
    ({"base_model": "a/b", "datasets": [], "learning_rate": 1e-4}, "the recipe of a training run"),
    ({"lora_rank": 8, "lora_scale": 2}, "it has custom keys (`lora_rank`)"),
    ({"hello": 1}, "no `peft_type`, `r` or `target_modules` (it has hello)"),
    ({}, "an empty object"),
]


@pytest.mark.parametrize(("raw", "what"), OTHERS)
def test_a_config_of_something_else(tmp_path: Path, raw: dict[str, Any], what: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(NotLora) as caught:
        open_config(path)
    assert caught.value.message.startswith(f"`{path}` ")
    assert what in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer, not JSON"),
        (b"<!DOCTYPE html>\n<html>Sign in</html>", "is a web page, not JSON"),
        (b'\xef\xbb\xbf{"peft_type": "LORA"}', "begins with a byte order mark"),
        ('{"peft_type": "LORA"}'.encode("utf-16"), "is UTF-16, and JSON is UTF-8"),
        (b'{"peft_type": "L\xd6RA"}', "is not UTF-8 (byte 16)"),
        (b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        open_config(path)
    assert what in caught.value.message
    assert caught.value.hint


def test_what_python_itself_makes_of_odd_json(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "lora_dropout": NaN, "megatron_config": {"a": -Infinity}}')
    assert str(open_config(path).raw["lora_dropout"]) == "nan"


def test_lines_and_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(
        b'{\r\n  "peft_type": "LORA",\r\n  "r": 4, "lora_alpha": 8,\r\n'
        b'  "auto_mapping": {"r": 1,\r\n    "x": "\\"r\\": 3, {[", "y": ["r", {"lora_alpha": 1}]},\r\n'
        b'  "base_model_name_or_path": "\\"r\\": 9",\r\n  "\\u0072": 16,\r\n  "caf\xc3\xa9": "r"}\r\n'
    )
    config = open_config(path)
    assert config.rank == 16
    assert config.repeated == ("r",)
    assert config.lines == {
        "peft_type": 2,
        "r": 7,
        "lora_alpha": 3,
        "auto_mapping": 4,
        "base_model_name_or_path": 6,
        "café": 8,
    }


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_links(adapter: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / name).unlink()
    for target, words in (
        (name, "leads nowhere: "),
        ("gone", "which does not exist"),
        (adapter / name, "leads out of"),
    ):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        with pytest.raises(UnreadableFile, match=words):
            inspect(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, PICKLE])
def test_what_is_no_file(adapter: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / (name if name != PICKLE else WEIGHTS)).unlink()
    (folder / name).mkdir()
    with pytest.raises(UnreadableFile, match="Is a directory"):
        inspect(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    with pytest.raises(UnreadableFile, match="is a pipe, not a regular file"):
        inspect(folder)
