"""Lets vLLM's V2 model runner start on a CPU, with Triton's kernels in the interpreter. Only for tests.

In: this folder on PYTHONPATH, and TRITON_INTERPRET=1. Out: a Triton back end called `cpu`, which is all that vLLM's CPU
build asks for before it chooses the V2 runner. It compiles nothing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton import backends
    from triton.backends.compiler import GPUTarget

    class Driver:
        """The driver of the interpreter: always there, on the CPU."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

    class Compiler:
        """Inductor asks which target it supports and for a hash. It is never asked to compile."""

        def __init__(self, target: GPUTarget) -> None:
            self.target = target

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return bool(target.backend == "cpu")

        def hash(self) -> str:
            return "interpreted"

    backends.backends["cpu"] = backends.Backend(compiler=Compiler, driver=Driver)  # type: ignore[arg-type]

if os.environ.get("KERNELS_OF_EXPERTS") == "1" and "spawn_main" in " ".join(sys.orig_argv):
    # A worker of several: it imports nothing of the process that started it.
    import compiled
    import experts

    compiled.use_gpu_wrapper()
    experts.add_kernels()
