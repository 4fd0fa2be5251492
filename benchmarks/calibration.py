"""How far healthy runs of PEFT and vLLM are apart: the measurements behind the tolerances in `lora_probe/precision.py`.

    python benchmarks/calibration.py [MODEL ...] > benchmarks/calibration.md

In: base models, by default the demo's. Out: a table in Markdown: for each model, adapter and dtype the largest
differences between both engines, in units of round-off of the dtype, beside what is allowed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_probe
from lora_probe.comparison import Comparison
from lora_probe.comparison.weights import relate
from lora_probe.precision import ROW_SLACK, rounding

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "identity"))

ADAPTERS: dict[str, dict[str, Any]] = {
    "q, k, v, r 8": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all linear, r 16, rsLoRA": {"r": 16, "lora_alpha": 24, "target_modules": "all-linear", "use_rslora": True},
}
PROMPTS = ["Who are you?", "Write one sentence about the sea, and then another one about the mountains behind it."]
COLUMNS = ("module", "row", "logprob", "base logprob", "factor", "rest")
"""Worst module over all rows, worst single row, largest log-probability difference of a token with the adapter and
without, |factor - 1| of the weights, and how far they are from a multiple."""


def write_adapter(base: str, folder: Path, settings: dict[str, Any]) -> Path:
    """An adapter of PEFT whose B is random, and moves the outputs by some percent."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


def compared(adapter: Path, base: str, dtype: str, folder: Path) -> Comparison:
    """PEFT against vLLM on the same tokens."""
    options = {"dtype": dtype}
    shared: dict[str, Any] = {"model": base, "max_tokens": 16, "options": options}
    in_peft = lora_probe.trace(adapter, engine="peft", prompts=PROMPTS, out=folder / "peft.lptrace", **shared)
    in_vllm = lora_probe.trace(adapter, engine="vllm", follow=in_peft.path, out=folder / "vllm.lptrace", **shared)
    return lora_probe.compare(in_peft, in_vllm)


def measured(comparison: Comparison) -> dict[str, float]:
    """The largest differences, as in COLUMNS."""
    one, two = (next(iter(trace.fingerprints.values())) for trace in comparison.traces)
    relations = [relation for key in one if key in two and (relation := relate(one[key], two[key])) is not None]
    return {
        "module": max(diff.error or 0.0 for diff in comparison.modules),
        "row": max(diff.worst_row or 0.0 for diff in comparison.modules),
        "logprob": comparison.outputs.adapter.logprob_error or 0.0,
        "base logprob": comparison.outputs.base.logprob_error or 0.0,
        "factor": max(abs(relation.factor - 1) for relation in relations),
        "rest": max(relation.rest for relation in relations),
    }


def lines(models: list[str]) -> Iterator[str]:
    """The table, line by line."""
    yield f"| model | adapter | dtype | modules | {' | '.join(COLUMNS)} | verdict |"
    yield "|" + "---|" * (len(COLUMNS) + 5)
    for base in models:
        for name, settings in ADAPTERS.items():
            for dtype in ("float32", "bfloat16"):
                with tempfile.TemporaryDirectory() as folder:
                    adapter = write_adapter(base, Path(folder) / "adapter", settings)
                    comparison = compared(adapter, base, dtype, Path(folder))
                    values, verdict = measured(comparison), comparison.verdict
                unit = rounding(dtype).round_off
                cells = " | ".join(f"{values[column] / unit:.2g}" for column in COLUMNS)
                count = len(comparison.modules)
                yield f"| {Path(base).name} | {name} | {dtype} | {count} | {cells} | {verdict} |"
    for dtype in ("float32", "bfloat16"):
        known = rounding(dtype)
        allowed = f"{known.drift:.0f} | {ROW_SLACK * known.drift:.0f} | {known.logprob:.0f} | {known.logprob:.0f}"
        yield f"| *allowed* | | {dtype} | | {allowed} | see `comparison/weights.py` | | |"


if __name__ == "__main__":
    from base_model import base_model

    for line in lines(sys.argv[1:] or [base_model(None)]):
        print(line, flush=True)
