"""Files of pytest-benchmark with results of our benchmarks.

In: what was measured. Out: the file, with the fields that pytest-benchmark 5 writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def speed(mode: str, to: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """`extra_info` of a mode; every ratio is the same for prefill and decode."""
    least = more.pop("least", None)
    ratios = [
        {"to": to, "values": list(values), "of": of, "least": least if of == "decode" else None}
        for of in ("speed", "prefill", "decode")
    ]
    rates = {"output_tokens_per_second": 40.0, "mean_ttft_ms": 120.0}
    return {"mode": mode, "group": "throughput", "rates": rates, "ratios": ratios, "rank": 8, "batch": 4} | more


def process(mode: str, to: str, values: Sequence[float], most: float | None = None, **more: Any) -> dict[str, Any]:
    """`extra_info` of a whole process and its limit."""
    ratios = [{"to": to, "values": list(values), "of": "time", "most": most}]
    return {"mode": mode, "group": "hot paths", "ratios": ratios, "peak_mib": 50.0} | more


def save_benchmark(path: Path, measured: Sequence[dict[str, Any]], **changes: Any) -> Path:
    stats = {"min": 0.1, "max": 0.3, "mean": 0.2, "median": 0.2, "stddev": 0.01, "rounds": 3, "data": [0.1, 0.2, 0.3]}
    benchmarks = [
        {"name": f"test_{number}", "fullname": f"x::test_{number}", "stats": stats, "extra_info": extra}
        for number, extra in enumerate(measured)
    ]
    machine = {"machine": "x86_64", "python_version": "3.11.7", "cpu": {"brand_raw": "A Processor", "count": 2}}
    content = {"machine_info": machine, "datetime": "2026-01-01T00:00:00+00:00", "version": "5.3.1"}
    path.write_text(json.dumps(content | {"benchmarks": benchmarks} | changes))
    return path
