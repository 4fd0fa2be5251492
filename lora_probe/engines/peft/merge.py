"""A merge by PEFT.

In: a working folder with the request in `merge.json`. Out: in that folder, `model/` (weights, config, tokenizer) and
the timeline in `merge/events.jsonl`. It runs in a separate process, which `launch.merge` starts.
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

MERGE = "merge.json"
MERGED = "model"


class MergeSpec(msgspec.Struct, frozen=True):
    """What to merge. `dtype` is that of the base; PEFT loads the adapter as it does by default."""

    adapter: str
    model: str
    dtype: str = "auto"


def merge_into(folder: Path) -> None:
    """`PeftModel.from_pretrained(...).merge_and_unload()`, saved as safetensors together with the base's tokenizer.

    PEFT's warnings become events of the stage `said`.

    Raises:
        EngineFailed: with the message of transformers or PEFT.
    """
    from peft import PeftModel

    spec = msgspec.json.decode((folder / MERGE).read_bytes(), type=MergeSpec)
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
            # PEFT may raise any exception, depending on the kind of layer; its message is passed on.
            except Exception as error:
                raise EngineFailed(f"PEFT cannot merge `{spec.adapter}`: {first_lines(error)}") from error
        for text in dict.fromkeys(str(warning.message) for warning in caught if _is_for_users(warning)):
            writer.event("said", short(text))
        try:
            load_tokenizer(spec.model).save_pretrained(folder / MERGED)
            tokenizer = "with the base model's tokenizer"
        except EngineFailed:
            # Without one, weights can still be compared, and the model can run on token ids.
            tokenizer = "without a tokenizer: the base model has none"
        writer.event("save", f"saved {tokenizer}", seconds=_since(started))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _is_for_users(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is for users, not for the callers of a deprecated function."""
    return issubclass(warning.category, UserWarning)
