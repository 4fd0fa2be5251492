"""What a real vLLM engine sets aside for adapters. Run by `test_cost.py` in a process of its own.

In: a base model and the arguments of `vllm.LLM` as JSON, from the command line. Out: as JSON, the bytes of all stacked
tensors of its LoRA layers, and the names of these layers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def main(model: str, settings: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from lora_probe_vllm.seams import manager_of

    llm = LLM(
        model=model, enable_lora=True, max_model_len=128, max_num_seqs=2, enforce_eager=True, **json.loads(settings)
    )
    worker = llm.llm_engine.model_executor.driver_worker
    manager = manager_of(getattr(worker, "worker", worker).model_runner)
    storages = {}
    for layer in manager.modules.values():
        for name, value in vars(layer).items():
            if name.endswith("_stacked"):
                storages |= {storage.data_ptr(): storage.nbytes() for storage in storages_of(value)}
    print(json.dumps({"bytes": sum(storages.values()), "layers": sorted(manager.modules)}))


def storages_of(value: Any) -> Iterator[Any]:
    """Those of a tensor, or of all tensors of a list: several may be views of one."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from storages_of(part)
    elif value is not None:
        yield value.untyped_storage()


if __name__ == "__main__":
    main(*sys.argv[1:])
