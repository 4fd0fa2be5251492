"""A base model, an adapter for it and their merge, as large as a 1.5B model in bfloat16: 3.1 GB in shards, twice.

In: an empty folder. Out: three folders. The float32 adapter has rank 16 on q, k, v and o; the merge is PEFT's
arithmetic, done with torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from made import ATTENTION, OF_1_5B, WEIGHTS

SHAPE, RANK, LAYERS_IN_A_SHARD = OF_1_5B, 16, 7
ADAPTED = SHAPE.layers * len(ATTENTION)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": SHAPE.layers,
    "hidden_size": SHAPE.hidden,
    "intermediate_size": SHAPE.inner,
    "vocab_size": SHAPE.vocabulary,
    "num_attention_heads": SHAPE.hidden // 128,
    "num_key_value_heads": SHAPE.keys // 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def save_pair(root: Path) -> tuple[Path, Path, Path]:
    """Base, adapter and merged model."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base, merged, adapter = (root / name for name in ("base", "merged", "adapter"))
    pairs: dict[str, Any] = {}
    placed: dict[str, str] = {}

    def save(number: int, wanted: dict[str, tuple[int, ...]]) -> None:
        tensors, results = {}, {}
        for name, shape in wanted.items():
            weight = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
            tensors[name], results[name] = weight, weight
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if name.removesuffix(".weight").rpartition(".")[2] in ATTENTION:
                a = torch.randn((RANK, shape[1]), generator=generator) * 0.02
                b = torch.randn((shape[0], RANK), generator=generator) * 0.01
                pairs[f"{stem}.lora_A.weight"], pairs[f"{stem}.lora_B.weight"] = a, b
                results[name] = weight.clone().add_((b @ a) * 2)
        file = f"model-{number:05d}-of-00005.safetensors"
        for folder, content in ((base, tensors), (merged, results)):
            save_file(content, folder / file, {"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))

    for folder in (base, merged, adapter):
        folder.mkdir()
    save(1, {"model.embed_tokens.weight": (SHAPE.vocabulary, SHAPE.hidden), "model.norm.weight": (SHAPE.hidden,)})
    for number in range(SHAPE.layers // LAYERS_IN_A_SHARD):
        layers = range(number * LAYERS_IN_A_SHARD, (number + 1) * LAYERS_IN_A_SHARD)
        save(number + 2, {name: shape for layer in layers for name, shape in _shapes(layer).items()})
    for folder in (base, merged):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    save_file(pairs, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(ATTENTION)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter, merged


def _shapes(layer: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in SHAPE.linear(layer).items()}
    return shapes | {f"model.layers.{layer}.input_layernorm.weight": (SHAPE.hidden,)}
