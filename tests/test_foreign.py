"""What is at a path that leads to no adapter: files of other libraries, copies, addresses, ids, traces."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, edited
from safetensors.numpy import load_file, save_file

from lora_probe import check, inspect
from lora_probe.adapter.foreign import foreign_tensors
from lora_probe.errors import ForeignWeights, UnreadableFile

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SECOND = "LP224"


def gguf(kind: str) -> bytes:
    """The beginning of a GGUF file, as llama.cpp's converters write it."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    pairs = {"general.architecture": "llama", "general.type": kind, "adapter.type": "lora"}
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    return head + b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs.items())


TENSORS = {
    "kohya": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.alpha"],
    "kohya of SDXL": ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"],
    "ComfyUI": ["diffusion_model.blocks.0.self_attn.q.lora_down.weight"],
    "diffusers": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "diffusers, before PEFT": ["unet.mid_block.attentions.0.processor.to_q_lora.down.weight"],
    "diffusers of Flux": ["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"],
    "MLX": ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
    "AdapterHub": ["bert.encoder.layer.0.output.adapters.sst-2.adapter_down.0.weight"],
    "AdapterHub's LoRA": ["roberta.encoder.layer.0.attention.self.query.loras.x.lora_A"],
    "SAMed": ["w_a_000", "w_b_000"],
    "whole model": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
}
WORDS = {
    "kohya": "kohya's format",
    "ComfyUI": "kohya's format",
    "diffusers": "diffusers' format",
    "MLX": "an MLX adapter",
    "AdapterHub": "an AdapterHub adapter",
    "SAMed": "a LoRA of Segment Anything",
    "whole model": "a whole model, or part of one",
}


def words(form: str) -> str:
    return next(sentence for start, sentence in WORDS.items() if form.startswith(start))


def write_tensors(path: Path, form: str) -> Path:
    save_file({name: np.ones((2, 3), np.float32) for name in TENSORS[form]}, path)
    return path


@pytest.mark.parametrize("form", TENSORS)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_with_the_weights_of_another_library(
    form: str, with_config: bool, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    """Under a name that says nothing, so that only the content can."""
    write_tensors(tmp_path / "weights.safetensors", form)
    if with_config:
        shutil.copy(adapter / CONFIG, tmp_path)
    status, _, err = call("inspect", tmp_path, capsys=capsys)
    assert status == 2
    assert "weights.safetensors holds " in err
    assert words(form) in err
    assert err.count("error:") == err.count("hint:") == 1


@pytest.mark.parametrize("form", TENSORS)
def test_the_file_itself_is_named_too(form: str, tmp_path: Path, capsys: Any) -> None:
    path = write_tensors(tmp_path / "weights.safetensors", form)
    for command in (["inspect"], ["check"], ["trace", "--engine", "peft"], ["parity", "--weights-only"]):
        status, _, err = call(*command, path, capsys=capsys)
        assert status == 2
        assert f"error: `{path}` holds " in err
        assert words(form) in err


@pytest.mark.parametrize("form", [form for form in TENSORS if not form.startswith(("diffusers", "AdapterHub's"))])
def test_under_the_name_that_loaders_read(form: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / CONFIG, tmp_path)
    write_tensors(tmp_path / WEIGHTS, form)
    with pytest.raises(ForeignWeights, match="holds "):
        inspect(tmp_path)
    report = check(tmp_path)
    assert [(d.code, d.path) for d in report.diagnostics] == [("LP102", str(tmp_path / WEIGHTS))]
    assert words(form) in report.diagnostics[0].message
    assert not report.ledgers


@pytest.mark.parametrize("with_config", [True, False])
def test_a_link_out_of_the_folder_is_not_read(with_config: bool, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    outside = write_tensors(tmp_path / "private.safetensors", "kohya")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "weights.safetensors").symlink_to(outside)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    if with_config:
        shutil.copy(adapter / CONFIG, folder)
    status, _, err = call("inspect", folder, capsys=capsys)
    assert status == 2
    assert "kohya" not in err
    assert "lora_unet" not in err


def test_an_adapter_of_peft_is_not_foreign(adapter: Path) -> None:
    assert foreign_tensors(load_file(adapter / WEIGHTS)) is None
    assert foreign_tensors(["base_model.model.classifier.weight", "base_model.model.classifier.bias"]) is None
    assert foreign_tensors(["transformer.h.0.attn.c_attn.lora_A.weight"]) is None
    assert foreign_tensors([]) is None
    assert foreign_tensors(["x.lora"], {"ss_network_dim": "8"}) is not None


@pytest.mark.parametrize(("kind", "what"), [("adapter", "a llama.cpp LoRA adapter (GGUF)"), ("model", "a GGUF file")])
def test_gguf(kind: str, what: str, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf(kind))
    for path in (tmp_path, tmp_path / "a.gguf"):
        status, _, err = call("inspect", path, capsys=capsys)
        assert status == 2
        assert f"is {what}" in err
        assert "the PEFT adapter that it was converted from" in err
    folder = edited(adapter, tmp_path / "named")
    for name in (WEIGHTS, PICKLE):
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / name).write_bytes(gguf(kind))
        assert f"`{folder / name}` is {what}" in call("inspect", folder, capsys=capsys)[2]


def test_npz(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    values = np.ones((2, 3), np.float32)
    np.savez(tmp_path / "adapters.npz", **{"model.layers.0.self_attn.q_proj.lora_a": values})
    assert "as MLX wrote its adapters" in call("inspect", tmp_path, capsys=capsys)[2]
    folder = edited(adapter, tmp_path / "named")
    with (folder / WEIGHTS).open("wb") as file:
        np.savez(file, weight=values)
    err = call("inspect", folder, capsys=capsys)[2]
    assert "is a NumPy archive (.npz), not the weights" in err
    assert "save it with safetensors" in err


def test_a_file_of_an_adapter_stands_for_its_folder(adapter: Path, capsys: Any) -> None:
    for name in (CONFIG, WEIGHTS):
        assert inspect(adapter / name).path == adapter
        for command in ("inspect", "check"):
            assert call(command, adapter / name, capsys=capsys) == call(command, adapter, capsys=capsys)


def test_a_lone_file_of_weights(adapter: Path, tmp_path: Path) -> None:
    """The advice is followed to the letter."""
    lone = Path(shutil.copy(adapter / WEIGHTS, tmp_path / "mine.safetensors"))
    with pytest.raises(UnreadableFile, match=f"there is no {CONFIG} next to") as caught:
        inspect(lone)
    assert caught.value.hint == (
        f"copy {CONFIG} from the training output into `{tmp_path}`, and rename the weights to {WEIGHTS}; "
        f"then pass `{tmp_path}`"
    )
    shutil.copy(adapter / CONFIG, tmp_path)
    with pytest.raises(UnreadableFile, match="has a name that no loader looks for") as caught:
        inspect(lone)
    assert caught.value.hint == f"rename it to {WEIGHTS}, and pass `{tmp_path}`"
    shutil.copy(lone, tmp_path / WEIGHTS)
    with pytest.raises(UnreadableFile, match=f"they read {WEIGHTS} in that folder"):
        inspect(lone)
    assert len(inspect(tmp_path).modules) == len(inspect(adapter).modules)


def test_copies(adapter: Path, tmp_path: Path) -> None:
    folder = edited(adapter, tmp_path / "a")
    shutil.copy(folder / CONFIG, folder / "adapter_config (5).json")
    (folder / "adapter_model (1).safetensors").write_bytes(b"other")
    notes = (
        f"no loader reads adapter_config (5).json, a copy that is the same as {CONFIG}",
        f"no loader reads adapter_model (1).safetensors, a copy that is different from {WEIGHTS}",
    )
    assert inspect(folder).notes == notes
    assert set(notes) <= set(check(folder).notes)
    (folder / CONFIG).unlink()
    with pytest.raises(UnreadableFile, match=rf"holds adapter_config \(5\).json but no {CONFIG}") as caught:
        inspect(folder)
    assert caught.value.hint == f"rename it to {CONFIG}"
    (folder / "adapter_config (5).json").rename(folder / CONFIG)
    assert inspect(folder).modules


def test_a_second_weights_file(adapter: Path, tmp_path: Path) -> None:
    folder = edited(adapter, tmp_path / "a")
    shutil.copy(folder / WEIGHTS, folder / PICKLE)
    assert SECOND not in {d.code for d in check(folder).diagnostics}
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, folder / PICKLE)
    (found,) = (d for d in check(folder).diagnostics if d.code == SECOND)
    assert found.severity == "warning"
    assert found.path == str(folder / PICKLE)
    assert f"1 of {len(tensors)} tensors differ" in found.message
    assert f"PEFT and vLLM read {WEIGHTS} and ignore {PICKLE}" in found.message
    (folder / PICKLE).write_bytes(b"not a file of weights")
    assert SECOND not in {d.code for d in check(folder).diagnostics}


def test_which_of_two_files_peft_reads(adapter: Path, llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file as load
    from transformers import AutoModelForCausalLM

    folder = edited(adapter, tmp_path / "a")
    tensors = load(folder / WEIGHTS)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / PICKLE)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder))
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    loaded = model.state_dict()[name.replace(".weight", ".default.weight")]
    assert torch.equal(loaded, tensors[name])
    assert SECOND in {d.code for d in check(folder).diagnostics}
    torch.save(tensors, folder / PICKLE)
    assert SECOND not in {d.code for d in check(folder).diagnostics}


def test_what_peft_does_with_the_weights_of_another_library(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """It serves the base model, as the page of LP102 states."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = edited(adapter, tmp_path / "a")
    write_tensors(folder / WEIGHTS, "kohya")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder))
    assert not any(value.any() for name, value in model.state_dict().items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        (
            "https://huggingface.co/org/repo",
            "hint: download it first: hf download org/repo\nhint: then pass org/repo\n",
        ),
        ("https://hf.co/org/repo/tree/main", "hf download org/repo\n"),
        ("hf://org/repo", "download the adapter first"),
        ("s3://bucket/adapter", "download the adapter first"),
    ],
)
def test_an_address(address: str, hint: str, capsys: Any) -> None:
    for command in (["inspect"], ["check"], ["trace", "--engine", "peft"]):
        status, _, err = call(*command, address, capsys=capsys)
        assert status == 2
        assert err.startswith(f"error: `{address}` is an address")
        assert hint in err


@pytest.fixture
def cached(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `org/adapter` in a cache, which links to files as the hub's library does."""
    repository = tmp_path / "hub" / "models--org--adapter"
    snapshot = repository / "snapshots" / "c0ffee"
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, repository / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_an_id_in_the_cache(cached: Path, adapter: Path, capsys: Any) -> None:
    assert inspect("org/adapter").path == cached
    for command in ("inspect", "check"):
        status, out, _ = call(command, "org/adapter", capsys=capsys)
        assert status == call(command, adapter, capsys=capsys)[0]
        # A long path is broken at the width of the terminal.
        assert str(cached) in "".join(out.split())
    assert "pass org/adapter" in call("inspect", "https://huggingface.co/org/adapter", capsys=capsys)[2]


def test_an_id_that_is_not_in_the_cache(cached: Path, tmp_path: Path, capsys: Any) -> None:
    for command in ("inspect", "check"):
        status, _, err = call(command, "org/other", capsys=capsys)
        assert status == 2
        assert f"`org/other` was not found: it is neither a folder nor a repository in {tmp_path / 'hub'}" in err
        assert "download it first: hf download org/other" in err


def test_a_folder_wins_over_the_cache(cached: Path, adapter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "org/adapter")
    assert inspect("org/adapter").path == Path("org/adapter")


def test_a_trace_is_not_an_adapter_and_an_adapter_is_not_a_trace(good: Path, adapter: Path, capsys: Any) -> None:
    for command in (["inspect"], ["check"], ["trace", "--engine", "peft"]):
        status, _, err = call(*command, good, capsys=capsys)
        assert status == 2
        assert err == f"error: `{good}` is a recorded trace, not an adapter\nhint: lora-probe show {good}\n"
    status, _, err = call("show", adapter, capsys=capsys)
    assert (status, err) == (2, f"error: `{adapter}` is an adapter, not a trace\nhint: lora-probe inspect {adapter}\n")


@pytest.mark.parametrize("below", ["", "checkpoint-1"])
def test_a_folder_of_adapters(below: str, adapter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / name / below)
    monkeypatch.chdir(tmp_path)
    status, _, err = call("check", capsys=capsys)
    assert status == 2
    assert f"{CONFIG} is not in it but in {Path('a') / below}, {Path('b') / below}\n" in err
    assert "hint: to check all 2 adapters: lora-probe check . --recursive\n" in err
    assert call("check", ".", "--recursive", capsys=capsys)[0] == 0


def test_a_name_that_begins_with_a_dash(adapter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "-dash")
    status, _, err = call("check", "-dash", capsys=capsys)
    assert status == 2
    assert "hint: to pass `-dash`, write ./-dash\n" in err
    assert call("check", "./-dash", capsys=capsys)[0] == 0
    assert call("check", "--", "-dash", capsys=capsys)[0] == 0
    assert "lora-probe inspect ./-dash" in call("show", "./-dash", capsys=capsys)[2]


def damaged_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(b"PK\x03\x04 and no more")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


def wrong_rank(folder: Path) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"r": "eight"}))


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


@pytest.mark.parametrize(
    ("damage", "file", "names_base"),
    [
        (damaged_pickle, PICKLE, True),
        (truncated, WEIGHTS, True),
        (wrong_rank, CONFIG, True),
        (without_config, WEIGHTS, False),
    ],
)
def test_the_report_on_unreadable_files(
    damage: Callable[[Path], None],
    file: str,
    names_base: bool,
    adapter: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    """It points at a file that exists, names the base model that the config names, and states its reason once."""
    monkeypatch.chdir(tmp_path)
    folder = edited(adapter, Path("a"))
    damage(folder)
    report = check(folder)
    (finding,) = report.diagnostics
    assert finding.path == f"a/{file}"
    assert report.model == (str(llama) if names_base else None)
    assert f"::error file=a/{file}," in call("check", "a", "--format", "github", capsys=capsys)[1]
    sarif = json.loads(call("check", "a", "--format", "sarif", capsys=capsys)[1])
    (result,) = sarif["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": f"a/{file}"}
    out = call("check", "a", capsys=capsys)[1]
    assert out.count(finding.message) == 1
    assert f"refused by both ({finding.code})" in out


COMMANDS: list[list[str]] = [
    ["inspect", "nope"],
    ["check", "nope"],
    ["check", "nope", "--select", "LP999"],
    ["trace", "nope", "--engine", "peft"],
    ["show", "nope"],
    ["compare", "nope", "nope"],
    ["parity", "nope"],
    ["rule", "LP999"],
    ["env", "--nope"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_of_an_error(command: list[str], capsys: Any) -> None:
    status, out, err = call(*command, "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert status == 2
    assert data.keys() == {"schema_version", "error"}
    assert data["error"].keys() == {"message", "hint"}
    hints = "".join(f"hint: {line}\n" for line in data["error"]["hint"].split("\n") if line)
    assert err == f"error: {data['error']['message']}\n{hints}"
    assert call(*command, capsys=capsys)[:2] == (2, "")


def test_a_newer_vllm_is_noted(adapter: Path) -> None:
    (note,) = (note for note in check(adapter, vllm_version="9.9").notes if "vLLM" in note)
    assert note == "vLLM 9.9 is newer than the versions known here (0.30 to 0.33); predicted as for vLLM 0.33"
    assert not any("newer" in note for note in check(adapter, vllm_version="0.33.1").notes)
