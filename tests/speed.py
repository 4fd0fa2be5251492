"""Which tests are slow: those that import torch, a library of an engine, or one of lora-probe's engines.

In: a collected test. Out: whether its code, or that of a fixture or a test function that it uses, does so.
`make test-fast` skips slow tests, and makes these libraries impossible to import, both in the process of the tests and
in those that they start.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

# Before numpy is imported: the matrices are small, and idle threads of BLAS spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

TESTS = Path(__file__).parent
FAST = "not slow"
"""The expression with which pytest is called for the fast tests alone."""
HEAVY = ("torch", "transformers", "peft", "vllm", "safetensors.torch", "lora_probe.engines.peft", "lora_probe_vllm")
STARTING = ("lora_probe.engines.launch", "lora_probe.engines.describing", "lora_probe.merging.parity")
"""Modules of ours whose public functions start processes that import these."""
WHY = "a fast test imports {name}: mark it slow (pytest.mark.slow), or take what it needs from tests/written.py"


def is_slow_file(path: Path) -> bool:
    return path.suffix == ".py" and "\npytestmark = pytest.mark.slow\n" in path.read_text()


def is_slow(item: pytest.Function) -> bool:
    fixtures = [one.func for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
    seen: set[Any] = set()
    return any(_imports_heavy(function, seen) for function in (item.function, *fixtures))


def _imports_heavy(thing: Any, seen: set[Any]) -> bool:
    thing = getattr(thing, "__wrapped__", thing)
    if isinstance(thing, type):
        return any(_imports_heavy(method, seen) for method in vars(thing).values() if isinstance(method, FunctionType))
    if not isinstance(thing, FunctionType) or thing in seen:
        return False
    if not _of_tests(thing):
        return thing.__module__ in STARTING and not thing.__name__.startswith("_")
    seen.add(thing)
    for code in _codes(thing.__code__):
        imports = [op.argval for op in dis.get_instructions(code) if op.opname == "IMPORT_NAME"]
        if any(name == heavy or name.startswith(f"{heavy}.") for name in imports for heavy in HEAVY):
            return True
        used = (thing.__globals__.get(name) for name in code.co_names)
        if any(_imports_heavy(one, seen) for one in used):
            return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _of_tests(function: FunctionType) -> bool:
    return Path(function.__code__.co_filename).is_relative_to(TESTS)


def forbid_torch(folder: Path) -> None:
    """Put modules that cannot be imported before the real ones, for this process and for all that it starts."""
    for name in ("torch", "transformers", "peft", "vllm"):
        (folder / f"{name}.py").write_text(f"raise ImportError({WHY.format(name=name)!r})\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
