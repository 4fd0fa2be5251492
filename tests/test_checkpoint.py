"""A whole model on disk as `checkpoint.py` opens it: its contents, and the errors if it cannot be opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merges import SIZES, damaged, save_model
from safetensors.numpy import save_file

from lora_probe.base import Checkpoint, find_model, open_base, open_checkpoint
from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.base.dequantised import dequantised
from lora_probe.errors import ProbeError, UnreadableFile

INDEX = "model.safetensors.index.json"
ONES, MATRIX = np.ones(2, np.float32), np.ones((2, 2), np.float32)


def model(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder with a config and, if passed, one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def pickled(folder: Path, content: Any, legacy: bool = False) -> Path:
    import torch

    model(folder)
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return folder


def refused(folder: Path, role: str = "base model") -> UnreadableFile:
    with pytest.raises(UnreadableFile) as caught:
        open_checkpoint(folder, role=role)
    assert caught.value.message.isprintable()
    return caught.value


def values(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    tensor = checkpoint.tensors[name]
    return tensor.rows(0, tensor.matrix[0])


@pytest.mark.parametrize("role", ["base model", "merged model"])
def test_a_file_without_tensors(tmp_path: Path, role: str) -> None:
    folder = model(tmp_path / "empty", {})
    assert refused(folder, role).message == f"`{folder}` holds no tensors"


# torch warns of what it will not keep for ever: quantised, sparse and nested tensors, typed storages.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda torch: torch.eye(3).to_sparse(), r"is sparse \(torch\.sparse_coo\)"),
        (lambda torch: torch.eye(3).to_sparse_csr(), r"is sparse \(torch\.sparse_csr\)"),
        (lambda torch: torch.empty(3, 3, device="meta"), "is on the meta device: it has no values"),
        (lambda torch: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "is a nested tensor"),
        (lambda torch: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"is quantised \(torch\.qint8\)"),
        (lambda torch: torch.ones(3, dtype=torch.complex64), r"is torch\.complex64, which is not supported"),
    ],
)
def test_a_pickled_tensor_that_is_no_plain_array(tmp_path: Path, make: Callable[[Any], Any], words: str) -> None:
    import torch

    odd = make(torch)
    # Torch itself cannot read a nested tensor in its old format.
    for legacy in (False, True)[: 1 if odd.is_nested else 2]:
        folder = pickled(tmp_path / "model", {"fine": torch.ones(2), "odd": odd}, legacy)
        with pytest.raises(UnreadableFile, match=words) as caught:
            open_checkpoint(folder)
        assert f"`{folder / 'pytorch_model.bin'}`: tensor 'odd' " in caught.value.message


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_values(tmp_path: Path, legacy: bool) -> None:
    """Parameters, transposed, negated in passing, without axes, empty: as torch would give them."""
    import torch

    torch.manual_seed(0)
    wide = torch.randn(4, 6)
    content = {
        "parameter": torch.nn.Parameter(wide),
        "turned": wide.T,
        "negated": torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "half": torch.randn(3, 3).half(),
        "flags": torch.tensor([[True, False]]),
    }
    found = open_checkpoint(pickled(tmp_path / "model", content, legacy))
    assert content["negated"].is_neg()
    for name, tensor in content.items():
        assert found.tensors[name].shape == tuple(tensor.shape)
        expected = tensor.detach().resolve_neg().numpy()
        np.testing.assert_array_equal(values(found, name).reshape(expected.shape), expected)
    np.testing.assert_array_equal(found.tensors["turned"].rows(2, 4), wide.T[2:4].numpy())


class Payload:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_execute_is_refused(tmp_path: Path, legacy: bool) -> None:
    import torch

    executed = tmp_path / "executed"
    folder = pickled(tmp_path / "model", {"a": torch.ones(2), "b": Payload(executed)}, legacy)
    message = refused(folder).message
    assert message == (
        f"torch's weights-only loader refuses `{folder / 'pytorch_model.bin'}`: "
        "Trying to load unsupported GLOBAL posix.mkdir whose module posix is blocked"
    )
    assert not executed.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert executed.exists()


def test_what_torch_says_is_told_in_whole_sentences(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "model" / "pytorch_model.bin"
    prefix = f"torch's weights-only loader refuses `{file}`: "
    folder = pickled(tmp_path / "model", torch.nn.Linear(2, 2))
    assert refused(folder).message == (
        f"{prefix}Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default"
    )
    pickled(folder, {"a": torch.ones(1000)})
    file.write_bytes(file.read_bytes()[:2000])
    message = refused(folder).message
    assert message == f"`{file}` is a damaged zip archive: it has no directory at its end; it may be truncated"
    pickled(folder, {"a": torch.ones(1000)}, legacy=True)
    file.write_bytes(file.read_bytes()[:2000])
    assert refused(folder).message.startswith(f"{prefix}unexpected EOF, expected ")
    assert refused(folder).message.endswith(" more bytes")
    file.write_bytes(b"hello")
    assert refused(folder).message == f"`{file}` is not a torch pickle: it begins with b'hello'"


def test_a_bin_that_is_none(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"")
    assert "is empty (0 bytes)" in refused(folder).message
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refused(folder).message
    file.unlink()
    file.mkdir()
    assert refused(folder).message == f"cannot read `{file}`: Is a directory"


@pytest.mark.parametrize(
    ("tensor", "file", "why"),
    [
        ("a", "", "this is not a valid file name"),
        ("a", ".", "this is not a valid file name"),
        ("a", "..", "this is not a valid file name"),
        ("a", "x\0.safetensors", "this is not a valid file name"),
        ("a", "\x1b[31mx.safetensors", "this is not a valid file name"),
        ("a", "x\n.safetensors", "this is not a valid file name"),
        ("a", "\ud800.safetensors", "this is not a valid file name"),
        ("a", "../x.safetensors", "outside of the folder"),
        ("a", "/etc/passwd", "outside of the folder"),
        ("a", "sub/", "outside of the folder"),
        ("a", "sub", "this is a folder"),
        ("a", "x" * 5000, "File name too long"),
        ("", "x.safetensors", "this is not a valid tensor name"),
        ("a\x07", "x.safetensors", "this is not a valid tensor name"),
    ],
)
def test_an_index_with_an_impossible_entry(tmp_path: Path, tensor: str, file: str, why: str) -> None:
    folder = model(tmp_path / "model")
    (folder / "sub").mkdir()
    save_file({"fine": ONES}, folder / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"fine": "x.safetensors", tensor: file}}))
    message = refused(folder).message
    assert message.startswith(f"`{folder / INDEX}` places the tensor {tensor!r} in the file {repr(file)[:117]}")
    assert why in message
    assert len(message) < 400


ROLES = [("base model", "--model"), ("merged model", "--merged")]


@pytest.mark.parametrize(("role", "option"), ROLES)
def test_a_model_that_is_not_there(tmp_path: Path, role: str, option: str) -> None:
    with pytest.raises(UnreadableFile, match=f"{role} `a/b` was not found") as caught:
        find_model("a/b", role=role)
    assert caught.value.hint == f"pass a folder or a cached model with {option}"
    bare = refused(tmp_path, role)
    assert bare.message == f"`{tmp_path}` is not a model folder: it has no config.json"
    assert bare.hint == f"pass the {role} with {option}"
    file = model(tmp_path / "model", {"a": ONES}) / "model.safetensors"
    single = refused(file, role)
    assert single.message == f"`{file}` is a file, but a {role} is a folder"
    assert single.hint == f"pass its folder with {option}: `{file.parent}`"


def test_a_name_that_no_model_can_have() -> None:
    """The name may come from an adapter's config."""
    with pytest.raises(UnreadableFile, match=r"base model .* was not found"):
        open_base("a\0b")
    with pytest.raises(UnreadableFile, match="File name too long"):
        open_base("a" * 5000)


@pytest.mark.parametrize(("role", "option"), ROLES)
def test_an_adapter_is_no_model(tmp_path: Path, role: str, option: str) -> None:
    folder = model(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert refused(folder, role).message == f"`{folder}` is an adapter, not a model"
    assert refused(folder, role).hint == f"pass the folder of the {role} with {option}"


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("tied", True), ("llama", False)])
def test_tied_where_the_config_is_silent(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = save_model(tmp_path / "model", kind)
    assert open_checkpoint(folder).tied is tied
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).tied is tied


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize(
    ("head", "tied"),
    [
        ("lm_head.weight", False),
        ("lm_head.qweight", False),
        ("model.embed_out.weight", False),
        ("output.weight", False),
        ("score.weight", False),
        ("classifier.out_proj.weight", False),
        ("lm_head.bias", True),
        ("h.0.output.weight", True),
        ("norm.weight", True),
    ],
)
def test_heads_and_embeddings(tmp_path: Path, name: str, head: str, tied: bool) -> None:
    one = {f"model.{name}.weight": MATRIX, head: ONES}
    assert open_checkpoint(model(tmp_path / "a", one)).tied is tied
    assert open_checkpoint(model(tmp_path / "b", one, tie_word_embeddings=not tied)).tied is not tied
    inner = open_checkpoint(model(tmp_path / "c", one, text_config={"tie_word_embeddings": not tied}))
    assert inner.tied is not tied
    other = {f"h.0.{name}.weight": MATRIX, f"x{name}.weight": MATRIX}
    assert open_checkpoint(model(tmp_path / "d", other)).tied is False


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def gemma3(folder: Path) -> Path:
    """A tiny model with a language model and a vision tower in it, and one config for each."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SIZES | {"num_key_value_heads": 4, "head_dim": 32, "pad_token_id": 0}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def in_fp8(tensors: dict[str, Any]) -> dict[str, Any]:
    """The projections of the language model, in blocks of 128 × 128."""
    import torch

    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("language_model") and name.endswith("proj.weight"):
            scale = tensor.float().unfold(0, 128, 128).unfold(1, 128, 128).abs().amax((-1, -2)) / 448
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            found |= {name: (tensor.float() / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    return found


def test_a_quantisation_that_the_inner_config_names(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    plain = gemma3(tmp_path / "plain")
    text = json.loads((plain / "config.json").read_text())["text_config"]
    inner = text | {"quantization_config": FP8 | {"modules_to_not_convert": ["lm_head", "vision_tower"]}}
    folder = damaged(plain, tmp_path / "fp8", in_fp8, text_config=inner)
    config = json.loads((folder / "config.json").read_text())
    # Gemma's default.
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    stored = open_checkpoint(folder)
    assert (stored.quantisation, stored.tied) == ("fp8", True)
    assert stored.quantization_config == inner["quantization_config"]
    found = dequantised(stored)
    assert found.tied
    original = load_file(plain / "model.safetensors")
    name = "layers.1.self_attn.q_proj.weight"
    (there,) = [tensor for tensor in found.tensors.values() if tensor.name.endswith(f"language_model.{name}")]
    assert there.dtype == "BF16"
    raw = torch.from_numpy(there.rows(0, 128).view(np.int16)).view(torch.bfloat16).float()
    torch.testing.assert_close(raw, original[f"language_model.model.{name}"].float(), rtol=0.07, atol=1e-3)


def test_an_inner_quantisation_that_cannot_be_undone(tmp_path: Path) -> None:
    folder = gemma3(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ProbeError, match=r"quantised \(gptq\), and transformers cannot dequantise them here: "
    ) as caught:
        dequantised(open_checkpoint(folder))
    assert not caught.value.message.endswith("'quantization_config'")
