"""What an adapter costs to serve, as text; pages are made of the same tables.

In: a `ServingCost`. Out: rich renderables: the verdict, memory and arithmetic with the flags and with those that fit,
what was measured, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType

from lora_probe.checking.cost import ServingCost
from lora_probe.errors import command_line
from lora_probe.recording.benchmarks import MERGED, WITH_ADAPTER
from lora_probe.render.cells import size, words
from lora_probe.render.document import Table
from lora_probe.render.tables import Facts, add_row, named_rows
from lora_probe.render.text.benchmarks import SPEEDS, number, speeds_of
from lora_probe.render.verdicts import of_cost

COMPUTED = (
    "Computed from the layers' shapes. A step of decoding also starts two kernels in each layer with LoRA, which no"
    " shape shows: measure it."
)
MEASURE = "pytest benchmarks/test_throughput.py --benchmark-only --benchmark-json BENCH.json --adapter"
"""In a checkout of lora-probe's repository."""


def cost(result: ServingCost) -> RenderableType:
    parts: list[RenderableType] = [of_cost(result).line]
    parts += [words(line, style="cyan") for line in advice(result)]
    for made in tables(result):
        table = named_rows(*made.headers)
        for row in made.rows:
            add_row(table, *row)
        parts += [words(""), words(made.title, style="bold"), table, words(made.about, style="dim")]
    parts += [words(note, style="bold yellow") for note in result.notes]
    return Group(*parts, words(""), Facts(*facts(result)))


def facts(result: ServingCost) -> tuple[tuple[str, str], ...]:
    """What the numbers are about."""
    named = {
        "adapter": f"{result.path}, rank {result.rank}",
        "base model": str(result.base.path),
        "layers of vLLM": f"{len(result.every.names)} can have LoRA, {len(result.fitting.slots.names)} need a slot",
        "slots in": result.dtype,
        "vLLM": result.vllm,
        "benchmark": "" if result.measured is None else f"{result.measured.path}, {result.measured.machine}",
    }
    return tuple((name, value) for name, value in named.items() if value)


def tables(result: ServingCost) -> Iterator[Table]:
    """The flags beside those that fit, and what was measured."""
    columns = result.given, result.fitting
    rows = [
        ("flags", *(at.flags.words for at in columns)),
        ("layers with slots", *(f"{len(at.slots.names)}" for at in columns)),
        ("memory of one slot", *(size(at.slot) for at in columns)),
        ("memory of all slots", *(size(at.slot * at.flags.max_loras) for at in columns)),
        (
            "relative to the base's weights",
            *(_share(at.slot * at.flags.max_loras, result.weights) for at in columns),
        ),
        ("more multiplications for each token", *(f"{100 * at.arithmetic:.2g} %" for at in columns)),
        ("more bytes read in a step of decoding", *(_share(at.read, result.weights) for at in columns)),
    ]
    yield Table("In vLLM", ("", "these flags", "flags that fit"), tuple(rows), about=COMPUTED)
    if result.measurements:
        measured = tuple(map(speeds_of, result.measurements))
        about = f"Measured with {_about(result)}: ratios of tokens per second, on that machine."
        yield Table("Measured", SPEEDS, measured, about=about)


def _about(result: ServingCost) -> str:
    adapters = sorted({(of.measured.adapter, of.measured.model) for of in result.measurements})
    return "this adapter" if result.of_this else ", ".join(f"{adapter} on {model}" for adapter, model in adapters)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "unknown"


def advice(result: ServingCost) -> Iterator[str]:
    """What was measured and what to do, the most useful first."""
    if result.refused:
        return
    given, fitting = result.given, result.fitting
    if result.rank > given.flags.max_lora_rank:
        yield f"vLLM refuses rank {result.rank} with --max-lora-rank {given.flags.max_lora_rank}"
    elif not result.fits:
        dropped = sorted({*fitting.slots.names} - {*given.slots.names})
        yield f"--lora-target-modules leaves out {dropped[0]}{f' and {len(dropped) - 1} more' if dropped[1:] else ''}"
    about = "" if result.of_this else f" (with {_about(result)})"
    for of in result.measurements:
        speed = of.measured.ratio("speed")
        if of.title in (WITH_ADAPTER, MERGED) and speed is not None:
            yield f"measured{about}, tokens per second: {of.title} {number(speed)} of {speed.to}"
    if fitting.slot < given.slot or not result.fits:
        saved = f": {size(given.slot - fitting.slot)} less for each slot" if result.fits else ""
        yield f"for this adapter alone, use {fitting.flags.words}{saved}"
    yield (
        "merged into the base it needs no slots and no kernels; each adapter then needs a copy of the model: "
        f"{size(result.weights)} instead of {size(fitting.slot)}. Check the merge with lora-probe parity"
    )
    if not result.of_this:
        yield f"to measure it: {MEASURE} {command_line([str(result.path), '--model', str(result.base.path)])}"
