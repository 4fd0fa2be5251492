"""A merge as PEFT makes it: base and adapter in, a model folder without LoRA layers out.

In: a working folder that holds `merge.json`. Out: `model/` in it (weights, config, tokenizer), and the story in
`merge/events.jsonl`. Runs in a process of its own; `launch.merge` starts it.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import msgspec

from lora_probe.engines.peft.models import dtype_of, first_lines, load_model, load_tokenizer, short
from lora_probe.errors import EngineFailed
from lora_probe.recording import SCHEMA, Process, TraceWriter

ASKED = "merge.json"
MERGED = "model"


class MergeSpec(msgspec.Struct, frozen=True):
    """What to merge. `dtype` is that of the base; PEFT loads the adapter as it does by default."""

    adapter: str
    model: str
    dtype: str = "auto"


def merge_into(folder: Path) -> None:
    """`PeftModel.from_pretrained(...).merge_and_unload()`, saved as safetensors together with the base's tokenizer.

    What PEFT warns of becomes an event of the stage `said`.

    Raises:
        EngineFailed: with what transformers or PEFT says.
    """
    from peft import PeftModel

    spec = msgspec.json.decode((folder / ASKED).read_bytes(), type=MergeSpec)
    process = Process(SCHEMA, role="merge", engine="peft", rank=0, pid=os.getpid(), versions={})
    with TraceWriter(folder / "merge", process) as writer:
        started = time.perf_counter()
        model = load_model(spec.model, spec.dtype)
        writer.event("model", f"{type(model).__name__} loaded, {dtype_of(model)}", seconds=_since(started))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                merged = PeftModel.from_pretrained(model, spec.adapter).merge_and_unload()
                writer.event("merge", "merge_and_unload() is done", seconds=_since(started))
                merged.save_pretrained(folder / MERGED, safe_serialization=True)
            # PEFT refuses in as many ways as it has kinds of layers; its own words are the message.
            except Exception as error:
                raise EngineFailed(f"PEFT cannot merge `{spec.adapter}`: {first_lines(error)}") from error
        for text in dict.fromkeys(str(warning.message) for warning in caught if _is_said(warning)):
            writer.event("said", short(text))
        try:
            load_tokenizer(spec.model).save_pretrained(folder / MERGED)
            beside = "with the base's tokenizer"
        except EngineFailed:
            # Weights can be compared, and run on token ids, without one.
            beside = "without a tokenizer, which the base lacks"
        writer.event("save", f"saved {beside}", seconds=_since(started))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _is_said(warning: warnings.WarningMessage) -> bool:
    """What is meant for users, not for the callers of a deprecated function."""
    return issubclass(warning.category, UserWarning)
