"""Loads adapters in vLLM's own LoRA manager, without an engine: `python tests/vllm_loads.py CASES OUT`.

In: a JSON file, a list of {"name", "adapter", "base", "runner"}. Out: a JSON file, {name: {"refused": message or null,
"modules": {module: which of its parts got a pair}} or
{"not_built": message}}. The model and the manager are those that the plugin describes, on
the meta device: vLLM reads the files, checks them, and copies every pair to its layer, as in a server.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def load_all(cases: list[dict[str, str]]) -> dict[str, Any]:
    from lora_probe_vllm.seams import Patches, seams
    from lora_probe_vllm.view import _built

    workers: list[Any] = []

    def remembering(original: Any) -> Any:
        def create_lora_manager(self: Any, *args: Any) -> Any:
            workers.append(self)
            return original(self, *args)

        return create_lora_manager

    results: dict[str, Any] = {}
    built, why, before = "", "", 0
    with Patches() as patches:
        patches.wrap(seams.lru_worker_manager, "create_lora_manager", remembering)
        # One model of each base is enough; the first is that with experts, which need one process group more.
        for number, case in enumerate(sorted(cases, key=lambda case: ("mixtral" not in case["base"], case["base"]))):
            wanted = f"{case['base']} {case['runner']}"
            if wanted != built:
                before, built = len(workers), wanted
                try:
                    _built(Path(case["base"]), case["runner"])
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
            if len(workers) == before:
                results[case["name"]] = {"not_built": why}
            else:
                results[case["name"]] = load(workers[-1], case["adapter"], number + 1)
    return results


def load(worker: Any, adapter: str, number: int) -> dict[str, Any]:
    """What vLLM does with one adapter: its refusal, or the parts of layers that get a pair."""
    from vllm.lora.request import LoRARequest

    manager = worker._adapter_manager
    filled: dict[str, list[int]] = {}

    def remembering(name: str, original: Any) -> Any:
        def set_lora(index: int, lora_a: Any, lora_b: Any) -> None:
            original(index, lora_a, lora_b)
            parts = lora_a if isinstance(lora_a, list) else [lora_a]
            filled[name] = [part for part, a in enumerate(parts) if a is not None]

        return set_lora

    for name, layer in manager.modules.items():
        layer.set_lora = remembering(name, type(layer).set_lora.__get__(layer))
    try:
        worker.add_adapter(LoRARequest(f"adapter-{number}", number, adapter))
        worker.remove_adapter(number)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}", "modules": {}}
    return {"refused": None, "modules": filled}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    Path(sys.argv[2]).write_text(json.dumps(load_all(json.loads(Path(sys.argv[1]).read_text()))))
