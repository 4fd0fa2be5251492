"""A saved benchmark as text: ratios first, then the figures of this machine.

In: `Benchmarks`. Out: rich renderables: the verdict, the tables, the facts; pages are made of the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType

from lora_probe.recording.benchmarks import THROUGHPUT, Benchmarks, Measurement, Of, Ratio
from lora_probe.render.cells import words
from lora_probe.render.document import Table
from lora_probe.render.tables import Facts, add_row, named_rows
from lora_probe.render.verdicts import of_benchmarks

NOISE = "±"
"""Follows a ratio whose rounds do not show a difference."""
ABOUT = (
    f"Medians over the rounds, in brackets the range of the median (up to five rounds: all); {NOISE}: no difference"
    " beyond the noise."
    " Compare ratios between machines, not seconds."
)
RATES = {
    "requests_per_second": "requests/s",
    "total_tokens_per_second": "total tokens/s",
    "output_tokens_per_second": "output tokens/s",
    "mean_ttft_ms": "mean TTFT (ms)",
    "mean_tpot_ms": "mean TPOT (ms)",
    "prefill_tokens_per_second": "prefill tokens/s",
    "decode_tokens_per_second": "decode tokens/s",
}
"""Rates by their headers, with vLLM's names where it has one."""


def benchmarks(result: Benchmarks) -> RenderableType:
    """One table for each group."""
    parts: list[RenderableType] = [of_benchmarks(result).line]
    for made in tables(result):
        table = named_rows(*made.headers)
        for place, (name, *cells) in enumerate(made.rows):
            add_row(table, words(name, style="bold red" if place in made.bad else ""), *cells)
        parts += [words(""), words(made.title, style="bold"), table]
        if made.about:
            parts.append(words(made.about, style="dim"))
    return Group(*parts, words(""), Facts(*facts(result)))


def facts(result: Benchmarks) -> tuple[tuple[str, str], ...]:
    """What was measured, on which machine."""
    measured = [measurement.measured for measurement in result.measurements]
    versions: dict[str, str] = {}
    for of_one in measured:
        versions |= of_one.versions
    named = {
        "adapter": _distinct(of.adapter for of in measured),
        "rank": _distinct(str(of.rank or "") for of in measured),
        "base model": _distinct(of.model for of in measured),
        "dtype": _distinct(of.dtype for of in measured),
        "requests at a time": _distinct(str(of.batch or "") for of in measured),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "machine": result.machine,
        "measured": result.created,
    }
    return tuple((name, value) for name, value in named.items() if value)


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def tables(result: Benchmarks) -> tuple[Table, ...]:
    """A table for each group, and one of the figures behind the ratios of throughput."""
    made: list[Table] = []
    for group, measurements in result.groups.items():
        if group == THROUGHPUT:
            made += [_speeds(measurements), _rates(measurements)]
        else:
            made.append(_processes(group, measurements))
    return tuple(made)


SPEEDS = ("mode", "tokens/s", "prefill", "decode", "relative to")


def speeds_of(measurement: Measurement) -> tuple[str, ...]:
    """The cells of a mode under the headers SPEEDS."""
    speed = measurement.measured.ratio("speed")
    ratios = [_cell(measurement, of) for of in ("speed", "prefill", "decode")]
    return (measurement.title, *ratios, speed.to if speed else "")


def _speeds(measurements: Sequence[Measurement]) -> Table:
    rows = tuple((*speeds_of(of), _targets(of)) for of in measurements)
    return Table("Throughput", (*SPEEDS, "target"), rows, _missed(measurements), ABOUT)


def _rates(measurements: Sequence[Measurement]) -> Table:
    names = [name for name in RATES if any(name in of.measured.rates for of in measurements)]
    rows = tuple(
        (of.title, *(f"{of.measured.rates[name]:.4g}" if name in of.measured.rates else "" for name in names))
        for of in measurements
    )
    return Table("Figures on this machine", ("mode", *(RATES[name] for name in names)), rows)


def _processes(group: str, measurements: Sequence[Measurement]) -> Table:
    rows = []
    for measurement in measurements:
        peak, limit = measurement.measured.peak_mib, measurement.measured.ratio("time")
        rows.append(
            (
                measurement.title,
                f"{measurement.seconds:.3g}",
                "" if peak is None else f"{peak:.0f}",
                _cell(measurement, "time"),
                limit.to if limit else "",
                _peer(measurement),
                _targets(measurement),
            )
        )
    headers = ("what", "seconds", "peak MiB", "ratio", "compared with", "time of peers", "target")
    return Table((group or "benchmarks").capitalize(), headers, tuple(rows), _missed(measurements), ABOUT)


def _cell(measurement: Measurement, of: Of) -> str:
    ratio = measurement.measured.ratio(of)
    return "" if ratio is None else number(ratio)


def number(ratio: Ratio) -> str:
    """`0.97 (0.95-0.98)`."""
    mark = f" {NOISE}" if ratio.noise else ""
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}){mark}"


def _peer(measurement: Measurement) -> str:
    peers = [ratio for ratio in measurement.measured.ratios if ratio.of == "peer"]
    return ", ".join(f"{ratio.median:.1f} times ({ratio.to})" for ratio in peers)


def _targets(measurement: Measurement) -> str:
    """`>= 0.97 of decode, missed`."""
    texts = []
    for ratio in measurement.measured.ratios:
        of = "" if ratio.of in ("speed", "time") else f" of {ratio.of}"
        bounds = [f">= {ratio.least:g}"] if ratio.least is not None else []
        bounds += [f"<= {ratio.most:g}"] if ratio.most is not None else []
        state = ", missed" if ratio.missed else "" if ratio.met else ", within the noise"
        texts += [f"{bound}{of}{state}" for bound in bounds]
    return "; ".join(texts)


def _missed(measurements: Sequence[Measurement]) -> frozenset[int]:
    return frozenset(
        number for number, of in enumerate(measurements) if any(ratio.missed for ratio in of.measured.ratios)
    )
