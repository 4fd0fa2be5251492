"""An adapter folder on disk.

In: a path. Out: an `Adapter` with its config and its pairs of tensors, and what follows from them without an engine:
the modules that it targets and the spectrum of every ΔW.
"""

from __future__ import annotations

from lora_probe.adapter.checkpoint import Adapter, AdapterModule, OtherTensor, adapter_in, open_adapter
from lora_probe.adapter.config import AdapterConfig, TrainedAs, open_config
from lora_probe.adapter.file_names import CONFIG, WEIGHTS
from lora_probe.adapter.folder import find_checkpoint, located
from lora_probe.adapter.pushed import PushedTensors, pushed_adapter

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "AdapterConfig",
    "AdapterModule",
    "OtherTensor",
    "PushedTensors",
    "TrainedAs",
    "adapter_in",
    "find_checkpoint",
    "located",
    "open_adapter",
    "open_config",
    "pushed_adapter",
]
