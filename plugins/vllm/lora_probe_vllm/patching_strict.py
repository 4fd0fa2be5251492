"""The patch around vLLM's call to load an adapter, in which strict mode may refuse it.

In: the `Patches` to add to, and how to find the probe of a model runner. Out: exceptions of `Strict`, with nothing of
the refused adapter left in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_probe_vllm.observing import Find
from lora_probe_vllm.seams import Patches, seams
from lora_probe_vllm.worker import Probe


def patch_strict(patches: Patches, probe_of: Find) -> None:
    """Inside a step vLLM loads adapters by `set_active_adapters`; an `add_lora` is always a request that may fail."""

    def add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of(self)
            if probe is None or not probe.recording:
                return original(self, lora_request, *args, **kwargs)
            adapter_id = int(lora_request.lora_int_id)
            with probe.strict.loading():
                try:
                    result = original(self, lora_request, *args, **kwargs)
                    if (active := probe.loads.get(adapter_id)) is not None:
                        probe.strict.after_placing(active)
                except Exception:
                    with probe.guard("removing a refused adapter"):
                        _remove(probe, self.lora_manager, adapter_id)
                    raise
            return result

        return wrapper

    patches.wrap(seams.runner_mixin, "add_lora", add_lora)


def _remove(probe: Probe, manager: Any, adapter_id: int) -> None:
    """Remove an adapter that was refused after vLLM had registered it: otherwise the next load finds it in the cache
    and succeeds. One that was refused while it was read was not registered, and its predecessor is still served."""
    active = probe.loads.get(adapter_id)
    if active is not None and active.record.load.refused:
        manager.remove_adapter(adapter_id)
        probe.loads.pop(adapter_id, None)
