"""A base model on disk, and what an engine has for it.

In: the folder of a model. Out: its config and shapes (`Base`), its tensors (`Checkpoint`), and the modules of an engine
that serves it (`EngineView`).
"""

from __future__ import annotations

from lora_probe.base.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from lora_probe.base.engine_view import EngineView, ModuleView, Rename, Shapes
from lora_probe.base.model import Base, find_model, open_base

__all__ = [
    "Base",
    "Checkpoint",
    "EngineView",
    "ModuleView",
    "Rename",
    "Shapes",
    "StoredTensor",
    "find_model",
    "open_base",
    "open_checkpoint",
]
