"""Loads adapters in vLLM's own LoRA manager, without an engine: `python tests/vllm_loads.py CASES OUT`.

In: a JSON file, a list of {"name", "adapter", "base"}. Out: a JSON file, {name: {"view": the plugin's description of
the base, or why there is none, "load": {"refused": message or null, "modules": {module: which of its parts got a pair}}
or {"not_built": message}}}. The model and the manager are those that the plugin describes, on the meta device: vLLM
reads the files, checks them, and copies every pair to its layer, as in a server.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec


def load_all(cases: list[dict[str, str]]) -> dict[str, Any]:
    from lora_probe.adapter import open_config
    from lora_probe.base import open_base
    from lora_probe.errors import EngineFailed
    from lora_probe_vllm.engine import VllmEngine
    from lora_probe_vllm.seams import Patches, seams

    workers: list[Any] = []

    def remembering(original: Any) -> Any:
        def create_lora_manager(self: Any, *args: Any) -> Any:
            workers.append(self)
            return original(self, *args)

        return create_lora_manager

    results: dict[str, Any] = {}
    views: dict[tuple[str, str | None], tuple[Any, Any]] = {}
    engine = VllmEngine()
    with Patches() as patches:
        patches.wrap(seams.lru_worker_manager, "create_lora_manager", remembering)
        # A model with experts needs one process group more, so it must be the first.
        for number, case in enumerate(sorted(cases, key=lambda case: ("mixtral" not in case["base"], case["base"]))):
            trained = open_config(Path(case["adapter"]) / "adapter_config.json").trained_as
            wanted = case["base"], trained.task
            if wanted not in views:
                workers.clear()
                try:
                    view = msgspec.to_builtins(engine.describe(open_base(case["base"]), trained))
                except EngineFailed as error:
                    view = error.message
                views[wanted] = view, workers[-1] if workers else None
            view, worker = views[wanted]
            loaded = {"not_built": view} if worker is None else load(worker, case["adapter"], number + 1)
            results[case["name"]] = {"view": view, "load": loaded}
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
        if "experts" in name.split("."):
            # The plugin leaves out their kernels, and with them their buffers.
            layer.reset_lora = lambda index: None
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
