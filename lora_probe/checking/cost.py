"""What an adapter costs to serve in vLLM: `cost`.

In: an adapter folder, its base model, and vLLM's flags. Out: a `ServingCost`: the memory of slots at these flags, the
flags that fit, and the slowdown, computed from shapes or measured by a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_probe.adapter import Adapter, located, open_adapter
from lora_probe.base import Base, EngineView
from lora_probe.checking.bases import Bases
from lora_probe.checking.check import serving_of
from lora_probe.errors import ModelNotFound, ProbeError
from lora_probe.files import limits
from lora_probe.precision import DTYPES
from lora_probe.prediction import predict, subject_of, vllm
from lora_probe.prediction.slots import Slots, slots
from lora_probe.presented import Presented
from lora_probe.recording.benchmarks import THROUGHPUT, Benchmarks, Measurement, open_benchmarks
from lora_probe.rules.lp4_serving import DEFAULT_MAX_RANK, MAX_RANKS, enough
from lora_probe.rules.subject import Serving, Subject

AUTO = "auto"
BYTES = 2
"""Of a value, if no dtype is passed: vLLM serves float32 models in 16 bits by default."""


@dataclass(frozen=True)
class Flags:
    """vLLM's flags for LoRA. `targets` is None without `--lora-target-modules`."""

    max_lora_rank: int
    max_loras: int = 1
    targets: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        """As on a command line."""
        words = [f"--max-lora-rank {self.max_lora_rank}", f"--max-loras {self.max_loras}"]
        words += [f"--lora-target-modules {' '.join(self.targets)}"] if self.targets is not None else []
        return " ".join(words)


@dataclass(frozen=True)
class AtFlags:
    """vLLM's slots with some flags. `width` is the bytes of a value, `products_of_base` the multiplications for each
    token of all layers that vLLM can adapt."""

    flags: Flags
    slots: Slots
    width: int
    products_of_base: int

    @property
    def slot(self) -> int:
        """Bytes of one slot in all layers."""
        return self.slots.values(self.flags.max_lora_rank) * self.width

    @property
    def read(self) -> int:
        """The bytes of one slot that a step of decoding reads."""
        return self.slots.read(self.flags.max_lora_rank) * self.width

    @property
    def arithmetic(self) -> float:
        """The multiplications that LoRA adds for each token, relative to those of the base."""
        return self.slots.products(self.flags.max_lora_rank) / max(self.products_of_base, 1)


@dataclass(frozen=True, repr=False)
class ServingCost(Presented):
    """What an adapter costs.

    `rank` is the adapter's largest, `dtype` that of the slots, and `weights` the bytes of the base. `every` are the
    slots of all layers that vLLM can adapt; `given` is with the flags that were passed, `fitting` with those that are
    as small as the adapter allows. `refused` is why vLLM refuses the adapter with any flags. `measured` is a benchmark
    of this or of another adapter.
    """

    adapter: Adapter
    base: Base
    vllm: str
    rank: int
    dtype: str
    weights: int
    every: Slots
    given: AtFlags
    fitting: AtFlags
    refused: str = ""
    notes: tuple[str, ...] = ()
    measured: Benchmarks | None = None

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def fits(self) -> bool:
        """Whether the flags admit the adapter's rank, and all its layers."""
        admitted = {*self.fitting.slots.names} <= {*self.given.slots.names}
        return admitted and self.rank <= self.given.flags.max_lora_rank and not self.refused

    @property
    def of_this(self) -> bool:
        """Whether the benchmark is of this adapter."""
        measured = {of.measured.adapter for of in self.measurements}
        return {Path(path).resolve() for path in measured} == {self.path.resolve()}

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """What the benchmark measured of throughput."""
        return tuple(self.measured.groups.get(THROUGHPUT, ())) if self.measured is not None else ()


def cost(
    adapter: str | Path,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    benchmark: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ServingCost:
    """What an adapter costs to serve in vLLM. `options` are vLLM's flags by their names; `benchmark` is a file of
    `pytest benchmarks/ --benchmark-json`.

    Raises:
        ProbeError: there is no such adapter, or no base model, or vLLM accepts no adapter for it, or the file is none.
    """
    options = dict(options or {})
    measured = open_benchmarks(benchmark) if benchmark is not None else None
    limits.begin(located(Path(adapter)))
    opened, serving = open_adapter(adapter), serving_of(options, None)
    largest = replace(serving, max_lora_rank=None, lora_target_modules=None)
    base, view, subject = _described(opened, largest, Bases(model, progress))
    rank = max((pair.rank or 1 for pair in opened.modules), default=1)
    if rank > MAX_RANKS[-1]:
        raise ProbeError(
            f"`{opened.path}` has rank {rank}, more than vLLM's largest --max-lora-rank, {MAX_RANKS[-1]}",
            "serve the merged model instead, and check it with `lora-probe parity`",
        )
    every = slots(view)
    places = [place for place in subject.places[vllm.NAME].values() if place.module and not place.module.why_not]
    targets: tuple[str, ...] | None = tuple(sorted({place.name.rpartition(".")[2] for place in places if place.name}))
    needed = slots(view, targets)
    if not needed.names:
        raise ProbeError(f"vLLM adapts no module of `{opened.path}` in `{base.path}`", "see `lora-probe check`")
    if needed.names == every.names:
        targets = None
    count = options.get("max_loras") or 1
    flags = Flags(serving.max_lora_rank or DEFAULT_MAX_RANK, count, serving.lora_target_modules)
    dtype = serving.lora_dtype if serving.lora_dtype not in (None, AUTO) else serving.dtype
    ledger = predict(subject).ledgers.get(vllm.NAME)
    shapes = [shape for shape in base.shapes.values() if shape is not None]
    at = partial(AtFlags, width=_width(dtype), products_of_base=every.products_of_base)
    return ServingCost(
        adapter=opened,
        base=base,
        vllm=view.version,
        rank=rank,
        dtype=dtype if dtype not in (None, AUTO) else "16 bits",
        weights=sum(out * inner for out, inner in shapes) * _width(serving.dtype),
        every=every,
        given=at(flags, slots(view, flags.targets)),
        fitting=at(Flags(enough(rank), count, targets), needed),
        refused=(ledger.message or "see `lora-probe check`") if ledger is not None and ledger.refused else "",
        notes=tuple(_notes(options, every, view, len(shapes) < len(base.shapes))),
        measured=measured,
    )


def _described(adapter: Adapter, serving: Serving, bases: Bases) -> tuple[Base, EngineView, Subject]:
    """The base model, vLLM's view of it, and where the adapter's pairs lead.

    Raises:
        ModelNotFound: the base is not on this machine.
        ProbeError: vLLM makes no LoRA layers for it.
    """
    found = bases.base(adapter)
    if found.base is None:
        raise ModelNotFound(f"`{adapter.path}`: {found.origin.why_not}", "pass the base model with --model")
    described = bases.views(found.base, adapter.config.trained_as)
    view = described.views.get(vllm.NAME)
    if view is None or view.refuses:
        why = view.refuses if view is not None else described.missing.get(vllm.NAME, "nothing describes it")
        raise ProbeError(f"vLLM has no layers with LoRA for `{found.base.path}`: {why}", "see `lora-probe check`")
    subject = subject_of(adapter, serving, found.base, described.views, described.missing, found.origin)
    return found.base, view, subject


def _width(dtype: str | None) -> int:
    """Bytes of a value."""
    return next((of.width for of in DTYPES if of.name == dtype), BYTES)


def _notes(options: Mapping[str, Any], every: Slots, view: EngineView, quantised: bool) -> Iterator[str]:
    if every.unknown:
        yield f"{len(every.unknown)} layers of unknown size are not counted, {every.unknown[0]} among them"
    if (options.get("tensor_parallel_size") or 1) > 1:
        yield "with tensor parallelism each worker has a part of these slots; the sizes are those of whole layers"
    if view.source == "headers":
        yield "vLLM is not installed here: its layers are those in the headers of the base's files"
    if quantised:
        yield "the base has quantised weights, which are not counted"
