"""lora-probe: follow a LoRA adapter from its checkpoint to the tokens of an engine.

    adapter folder -> adapter -> rules -> ledger
    engine         -> trace   -> ledger, comparison -> render

The functions below, and the types of their results, are the whole public interface. Each is imported when it is first
used, so `import lora_probe` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_probe.adapter import Adapter
    from lora_probe.adapter import open_adapter as inspect
    from lora_probe.adapter.side_by_side import AdapterDiff, diff
    from lora_probe.checking import Report
    from lora_probe.checking.check import check
    from lora_probe.checking.cost import ServingCost, cost
    from lora_probe.comparison import Comparison, Comparisons, compare, compare_each
    from lora_probe.engines.asking import trace_server
    from lora_probe.engines.launch import trace
    from lora_probe.ledger import Ledger
    from lora_probe.merging.parity import Parity, parity
    from lora_probe.recording import Trace, open_trace

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterDiff",
    "Comparison",
    "Comparisons",
    "Ledger",
    "Parity",
    "Report",
    "ServingCost",
    "Trace",
    "__version__",
    "check",
    "compare",
    "compare_each",
    "cost",
    "diff",
    "inspect",
    "open_trace",
    "parity",
    "trace",
    "trace_server",
]

_HOMES = {
    "Adapter": ("lora_probe.adapter.checkpoint", "Adapter"),
    "AdapterDiff": ("lora_probe.adapter.side_by_side", "AdapterDiff"),
    "Comparison": ("lora_probe.comparison.compared", "Comparison"),
    "Comparisons": ("lora_probe.comparison.counterparts", "Comparisons"),
    "Ledger": ("lora_probe.ledger", "Ledger"),
    "Parity": ("lora_probe.merging.parity", "Parity"),
    "ServingCost": ("lora_probe.checking.cost", "ServingCost"),
    "Report": ("lora_probe.checking.report", "Report"),
    "Trace": ("lora_probe.recording.reader", "Trace"),
    "inspect": ("lora_probe.adapter.checkpoint", "open_adapter"),
    "check": ("lora_probe.checking.check", "check"),
    "cost": ("lora_probe.checking.cost", "cost"),
    "diff": ("lora_probe.adapter.side_by_side", "diff"),
    "trace": ("lora_probe.engines.launch", "trace"),
    "trace_server": ("lora_probe.engines.asking", "trace_server"),
    "open_trace": ("lora_probe.recording.reader", "open_trace"),
    "compare": ("lora_probe.comparison.counterparts", "compare"),
    "compare_each": ("lora_probe.comparison.counterparts", "compare_each"),
    "parity": ("lora_probe.merging.parity", "parity"),
}


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet: what completion in a notebook offers."""
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_probe' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
