"""The cost of checking a merge: time relative to reading both checkpoints, and peak memory, each in its own process.

Both models have the shapes of a 1.5B model in bfloat16, 3.1 GB in shards; the float32 adapter has rank 16 on q, k, v
and o. Rounds alternate, so that both see the same state of the machine; files are in the page cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Costs

LAYERS, HIDDEN, INNER, KEYS, VOCABULARY, RANK = 28, 1536, 8960, 256, 151936, 16
ADAPTED = {"q_proj": HIDDEN, "k_proj": KEYS, "v_proj": KEYS, "o_proj": HIDDEN}
LAYERS_IN_A_SHARD = 7
ROUNDS = 5

READ = """
import sys
buffer = bytearray(1 << 22)
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""

MEASURE = """
import os, sys
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small parent process: a child's peak includes the memory of its parent when it was spawned."""


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    inner = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {f"model.layers.{layer}.self_attn.{name}.weight": (width, HIDDEN) for name, width in ADAPTED.items()}
    tensors |= {f"model.layers.{layer}.mlp.{name}.weight": shape for name, shape in inner.items()}
    return tensors | {f"model.layers.{layer}.input_layernorm.weight": (HIDDEN,)}


def save_pair(root: Path) -> tuple[Path, Path, Path]:
    """Base, adapter and merged model; the merge is PEFT's arithmetic, done with torch."""
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
            if name.rpartition(".")[0].rpartition(".")[2] in ADAPTED:
                a = torch.randn((RANK, shape[1]), generator=generator) * 0.02
                b = torch.randn((shape[0], RANK), generator=generator) * 0.01
                pairs[f"{stem}.lora_A.weight"], pairs[f"{stem}.lora_B.weight"] = a, b
                results[name] = weight.clone().add_((b @ a) * 2)
        file = f"model-{number:05d}-of-00005.safetensors"
        for folder, content in ((base, tensors), (merged, results)):
            save_file(content, folder / file)
        placed.update(dict.fromkeys(tensors, file))

    for folder in (base, merged, adapter):
        folder.mkdir()
    save(1, {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for number in range(LAYERS // LAYERS_IN_A_SHARD):
        layers = range(number * LAYERS_IN_A_SHARD, (number + 1) * LAYERS_IN_A_SHARD)
        save(number + 2, {name: shape for layer in layers for name, shape in shapes(layer).items()})
    for folder in (base, merged):
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": True}))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    save_file(pairs, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(ADAPTED)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter, merged


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


def run(*command: str) -> tuple[float, float, str]:
    """Seconds and peak MiB of a process, and its output."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    return seconds, int(done.stderr.splitlines()[-1]) / 1024, done.stdout


def test_weights_only(pair: tuple[Path, Path, Path], benchmark: Any, costs: Costs) -> None:
    base, adapter, merged = pair
    files = [str(path) for folder in (base, merged) for path in sorted(folder.glob("*.safetensors"))]
    read = (sys.executable, "-c", READ, *files)
    command = Path(sys.executable).with_name("lora-probe")
    check = (str(command), "parity", str(adapter), "--model", str(base), "--merged", str(merged), "--weights-only")
    run(*read)
    reading, peaks = [], []

    def once() -> None:
        _, peak, printed = run(*check, "--format", "json")
        report = json.loads(printed)
        assert report["verdict"] == "verified"
        assert len(report["modules"]) == LAYERS * len(ADAPTED)
        assert all(module["bit_exact"] for module in report["modules"])
        peaks.append(peak)

    benchmark.pedantic(once, setup=lambda: reading.append(run(*read)[0]), rounds=ROUNDS, iterations=1)
    seconds = benchmark.stats.stats.median
    size = sum(Path(file).stat().st_size for file in files) / 2**20
    costs.add("read both checkpoints", statistics.median(reading), size)
    costs.add("parity --weights-only", seconds, size, ratio=seconds / statistics.median(reading), peak=max(peaks))
