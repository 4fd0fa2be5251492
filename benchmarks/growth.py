"""How the cost of an adapter grows: with its rank, the tokens of a prompt, the requests at a time, and the adapters.

    python benchmarks/growth.py --out benchmarks/growth

In: an adapter and its base model, by default the demo's. Out: `growth.md`, a table, and `growth.svg`, a picture of it:
tokens per second in vLLM with the adapter, relative to vLLM without LoRA on the same tokens. Both take turns. The
adapters of other ranks, and the further adapters of a batch, are made on the same modules.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

from conftest import DEMO
from engines import SPEEDS, Answer, Engines, EngineSpec, engines
from made import save_like
from rounds import take_turns

from lora_probe import inspect
from lora_probe.recording.benchmarks import Of, Ratio
from lora_probe.rules.lp4_serving import enough

RANKS = (8, 16, 32, 64)
PROMPTS = (8, 32, 128, 512)
REQUESTS = (1, 2, 4, 8)
ADAPTERS = (1, 2, 4, 8)
BATCH, PROMPT, TOKENS = 4, 32, 8
MOST_ADAPTERS = max(ADAPTERS)
PARTS: tuple[Of, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Point:
    """One measurement: the axis, where on it, and the ratios of prefill and of decode."""

    axis: str
    at: int
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class Bench:
    """What all points have in common."""

    place: Engines
    adapter: str
    base: EngineSpec
    rounds: int

    def point(
        self, axis: str, at: int, spec: EngineSpec, prompts: Sequence[Sequence[int]], adapters: Sequence[str]
    ) -> Point:
        """Measure an engine with these adapters in turn with one without LoRA."""

        def answer(spec: EngineSpec, adapters: Sequence[str | None]) -> Answer:
            return self.place.get(spec).answer(prompts, TOKENS, adapters)

        rounds = take_turns(lambda: answer(spec, adapters), lambda: answer(self.base, [None]), self.rounds)
        assert rounds.runs[0].tokens != rounds.others[0].tokens, f"{axis} {at}: the adapter changed no token"
        ratios = [Ratio("no LoRA", rounds.ratios(SPEEDS[part], SPEEDS[part]), part) for part in PARTS]
        print(f"{axis} {at}: " + ", ".join(f"{ratio.of} {ratio.median:.2f}" for ratio in ratios), flush=True)
        return Point(axis, at, tuple(ratios))


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Tokens that every model has; each prompt is another one."""
    return [[(37 * number + 7 * token) % 900 + 50 for token in range(length)] for number in range(count)]


def points(bench: Bench, spec: EngineSpec, folder: Path) -> Iterator[Point]:
    """All points. Engines are used one after the other, so that few are started."""
    for rank in RANKS:
        (folder / f"rank-{rank}").mkdir()
        made = str(save_like(folder / f"rank-{rank}", bench.adapter, rank))
        of_rank = replace(spec, max_rank=rank)
        yield bench.point("rank", rank, of_rank, prompts_of(BATCH, PROMPT), [made])
    for length in PROMPTS:
        yield bench.point("tokens of a prompt", length, spec, prompts_of(BATCH, length), [bench.adapter])
    for count in REQUESTS:
        yield bench.point("requests at a time", count, spec, prompts_of(count, PROMPT), [bench.adapter])
    several = replace(spec, max_loras=MOST_ADAPTERS)
    copies = [bench.adapter]
    for number in range(1, MOST_ADAPTERS):
        (folder / f"other-{number}").mkdir()
        copies.append(str(save_like(folder / f"other-{number}", bench.adapter, min(RANKS), number)))
    for count in ADAPTERS:
        yield bench.point("adapters in a batch of 8", count, several, prompts_of(8, PROMPT), copies[:count])


def table(found: Sequence[Point], about: str) -> str:
    """The points in Markdown."""
    lines = [about, "", "| | | prefill | decode |", "|---|--:|--:|--:|"]
    for point in found:
        cells = " | ".join(f"{of.median:.2f} ({of.low:.2f}-{of.high:.2f})" for of in point.ratios)
        lines.append(f"| {point.axis} | {point.at} | {cells} |")
    return "\n".join(lines) + "\n"


WIDTH, HEIGHT, LEFT, TOP = 220, 140, 50, 40
COLOURS = {"prefill": "#0969da", "decode": "#bc4c00"}


def picture(found: Sequence[Point]) -> str:
    """A panel for each axis, with a line for prefill and one for decode; whiskers are the range of the median."""
    axes = list(dict.fromkeys(point.axis for point in found))
    size = f'width="{LEFT + len(axes) * (WIDTH + LEFT)}" height="{TOP + HEIGHT + 60}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, axis in enumerate(axes):
        left = LEFT + number * (WIDTH + LEFT)
        parts.append(f'<text x="{left}" y="{TOP - 20}" font-weight="bold">{escape(axis)}</text>')
        for share in (0.0, 0.5, 1.0):
            y = TOP + HEIGHT * (1 - share)
            parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#d0d7de"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share:g}</text>')
        parts += _lines([point for point in found if point.axis == axis], left)
    for number, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + number * 90
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 45}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{LEFT + 180}" y="{TOP + HEIGHT + 45}">tokens per second, relative to no LoRA</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(found: Sequence[Point], left: int) -> Iterator[str]:
    step = WIDTH / max(len(found) - 1, 1)
    places = [left + number * step for number in range(len(found))]
    for x, point in zip(places, found, strict=True):
        yield f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{point.at}</text>'
    for index, part in enumerate(PARTS):
        ratios = [point.ratios[index] for point in found]
        heights = [TOP + HEIGHT * (1 - min(ratio.median, 1.1)) for ratio in ratios]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(places, heights, strict=True))
        yield f'<polyline points="{corners}" fill="none" stroke="{COLOURS[part]}" stroke-width="2"/>'
        for x, y, ratio in zip(places, heights, ratios, strict=True):
            low, high = (TOP + HEIGHT * (1 - min(bound, 1.1)) for bound in (ratio.low, ratio.high))
            yield f'<line x1="{x}" x2="{x}" y1="{low:.1f}" y2="{high:.1f}" stroke="{COLOURS[part]}"/>'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[part]}"/>'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=DEMO, help="default: the demo's")
    parser.add_argument("--model", help="base model; default: the adapter's own")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("growth"), help="name of both files without suffix")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    adapter = inspect(options.adapter)
    model = options.model or adapter.config.base_model
    rank = max(module.rank or 1 for module in adapter.modules)
    max_rank = enough(rank)
    spec = EngineSpec("vllm", model, options.dtype, 8, probe="absent", max_rank=max_rank)
    base = EngineSpec("vllm", model, options.dtype, 8, lora=False, probe="absent", max_rank=0, max_loras=0)
    with tempfile.TemporaryDirectory() as temporary, engines(Path(temporary) / "engines") as place:
        bench = Bench(place, str(adapter.path), base, options.rounds)
        found = list(points(bench, spec, Path(temporary)))
    about = f"{Path(model).name}, {options.dtype}, an adapter of rank {rank}; {os.cpu_count()} processors."
    options.out.with_suffix(".md").write_text(table(found, about))
    options.out.with_suffix(".svg").write_text(picture(found))


if __name__ == "__main__":
    main()
