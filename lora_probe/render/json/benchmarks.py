"""JSON of `show BENCH.json`: ratios with their spread. In: `Benchmarks`. Out: a plain dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_probe.render.json import SCHEMA_VERSION

if TYPE_CHECKING:
    from lora_probe.recording.benchmarks import Benchmarks, Measurement, Ratio


def benchmarks_json(result: Benchmarks) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": None if result.path is None else str(result.path),
        "created": result.created,
        "machine": result.machine,
        "measurements": [measurement_json(measurement) for measurement in result.measurements],
    }


def measurement_json(measurement: Measurement) -> dict[str, Any]:
    """One measurement, with its ratios."""
    measured = measurement.measured
    return {
        "name": measurement.name,
        "mode": measured.mode,
        "group": measured.group,
        "seconds": measurement.seconds,
        "rounds": measurement.rounds,
        "adapter": measured.adapter,
        "model": measured.model,
        "rank": measured.rank,
        "batch": measured.batch,
        "dtype": measured.dtype,
        "versions": measured.versions,
        "rates": measured.rates,
        "peak_mib": measured.peak_mib,
        "ratios": [_ratio(ratio) for ratio in measured.ratios],
    }


def _ratio(ratio: Ratio) -> dict[str, Any]:
    return {
        "of": ratio.of,
        "to": ratio.to,
        "median": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "noise": ratio.noise,
        "least": ratio.least,
        "most": ratio.most,
        "met": ratio.met,
        "missed": ratio.missed,
        "values": ratio.values,
    }
