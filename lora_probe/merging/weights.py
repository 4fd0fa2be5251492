"""A merged model against base plus adapter, in the weights: `check_merge`.

In: an adapter, its base model and a merged model, all on disk. Out: a `MergeReport`. Base and merged model are streamed
in blocks of rows, each tensor once, on one thread per processor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_probe.adapter import CONFIG, Adapter, open_adapter
from lora_probe.base import Checkpoint, StoredTensor, find_model, open_checkpoint
from lora_probe.base.dequantised import dequantised
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.files import limits, shown
from lora_probe.files.threads import on_all_processors
from lora_probe.ledger import Finding
from lora_probe.merging.diagnosis import judge, judge_replaced
from lora_probe.merging.names import HEAD, embeddings_of
from lora_probe.merging.neighbours import Neighbours
from lora_probe.merging.overlay import View, view
from lora_probe.merging.plan import Plan, plan
from lora_probe.merging.report import MergeReport, ModuleMerge, TensorFinding, unmeasured
from lora_probe.merging.scan import measure, replaced
from lora_probe.merging.sites import Site
from lora_probe.merging.untouched import absent_and_added, rounded_on_the_way, untouched
from lora_probe.precision import STORED
from lora_probe.rules.lp7_merging import not_judged
from lora_probe.rules.lp7_untouched import merged_into_another_base, tied_changed_too

PASSES = 10
"""The most passes over the bytes of both models, as measured on a merge in which every module is wrong."""
ANOTHER_BASE = 0.5
"""If more than this share of the untouched tensors differ, the model was merged from another base."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Suffixes of the architectures in config.json that have a language head."""


@dataclass(frozen=True)
class Progress:
    """Bytes of both checkpoints read so far, the total, and the current tensor."""

    done: int
    total: int
    tensor: str


def check_merge(
    adapter: str | Path,
    merged: str | Path,
    *,
    model: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> MergeReport:
    """Check whether `merged` is the base plus `adapter`, merged as PEFT does.

    Raises:
        UnreadableFile: a folder is missing, damaged, truncated, or of another architecture.
        ProbeError: no base model is known, or one of the models is quantised in a way that cannot be undone here.
    """
    started = time.perf_counter()
    checkpoint = open_adapter(adapter)
    name = checkpoint.config.base_or(model)
    limits.begin(checkpoint.path, find_model(name), Path(merged), times=PASSES)
    base = dequantised(open_checkpoint(name))
    target = dequantised(_open_merged(merged))
    if base.path.resolve() == target.path.resolve():
        raise ProbeError(
            f"base and merged model are the same folder, `{base.path}`",
            "pass two different folders with --model and --merged",
        )
    seen = view(checkpoint, base, target)
    work = _Work(checkpoint, seen, target, plan(checkpoint, seen), progress)
    modules, tensors = work.run()
    return MergeReport(
        adapter=checkpoint.path,
        base=base.path,
        merged=target.path,
        base_dtype=_dtype(base),
        merged_dtype=_dtype(target),
        modules=modules,
        tensors=tensors,
        compared=work.compared,
        untouched=work.untouched,
        foreign=work.foreign,
        read=work.done,
        seconds=time.perf_counter() - started,
        notes=(*checkpoint.notes, *work.notes()),
    )


def _open_merged(path: str | Path) -> Checkpoint:
    folder = Path(path)
    if (folder / CONFIG).exists() and not (folder / "config.json").exists():
        raise UnreadableFile(
            f"`{folder}` is an adapter, not a merged model",
            "pass the merged model with --merged; it may be swapped with CKPT or --model",
        )
    return open_checkpoint(path, role="merged model")


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the values."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype])


class _Work:
    """One run over both checkpoints, and its progress."""

    def __init__(
        self,
        adapter: Adapter,
        seen: View,
        merged: Checkpoint,
        planned: Plan,
        progress: Callable[[Progress], None],
    ) -> None:
        self.adapter, self.base, self.names, self.merged, self.plan = adapter, seen.base, seen.names, merged, planned
        self.inconsistent = seen.inconsistent
        self.progress, self.done, self.compared = progress, 0, 0
        self.untouched, self.foreign = 0, 0
        self.total = self.base.size + merged.size
        self.sites = planned.by_tensor()
        self.neighbours = Neighbours(planned.sites, self.base, adapter)
        self.factors: list[float] = []
        self.on_the_way: set[str] = set()

    def run(self) -> tuple[tuple[ModuleMerge, ...], tuple[TensorFinding, ...]]:
        """The modules in the order of the plan, and the findings about all other tensors and parts."""
        unmatched = absent_and_added(self.base, self.merged, self.names)
        tensors = [tensor for tensor in unmatched if not self._expected(tensor.name)]
        bad = {tensor.name for tensor in tensors}
        jobs = [name for name in self.base.tensors if self.names[name] in self.merged.tensors and name not in bad]
        modules: dict[tuple[str, str], ModuleMerge] = {}
        for name, judged, finding in on_all_processors(self._tensor, jobs):
            modules |= {(module.label, module.tensor): module for module in judged}
            self.untouched += not judged
            if finding is not None:
                tensors.append(TensorFinding(name, finding))
        self.compared = len(jobs)
        self.foreign = sum(tensor.finding.code == "LP708" for tensor in tensors)
        if self.inconsistent is not None:
            tensors.insert(0, TensorFinding(HEAD, self.inconsistent))
        ordered = [
            modules.get((site.label, site.tensor)) or unmeasured(site.key, site.label, site.tensor, "differs")
            for site in self.plan.sites
            if site.tensor in bad or (site.label, site.tensor) in modules
        ]
        ordered, tensors = _of_another_base(ordered, tensors, self.untouched)
        if self.plan.refusals:
            whole = [TensorFinding("", not_judged(why)) for why in self.plan.refusals]
            return tuple(_undecided(module) for module in ordered), tuple(whole)
        if self.plan.unplaced and not any(part.misfit for part in self.plan.unplaced):
            # A part that could not be placed may have changed the tensors that no module explains.
            tensors = [_doubtful(tensor) for tensor in tensors]
        for part in self.plan.unplaced:
            key = (part.label, "weight", None)
            ordered.append(unmeasured(key, part.label, "", "undecided", not_judged(part.why)))
        return tuple(ordered), tuple(tensors)

    def notes(self) -> Iterator[str]:
        for dtype in sorted(self.on_the_way):
            yield f"the base was rounded to {dtype} before it was saved in {_dtype(self.merged)}"

    def _expected(self, name: str) -> bool:
        """Whether `name` is a language head, and the merged model's architecture has none."""
        classes = self.merged.config.get("architectures")
        headless = isinstance(classes, list) and not any(
            str(architecture).endswith(_WITH_HEAD) for architecture in classes
        )
        return headless and name in self.base.tensors and name.rpartition(".")[0].endswith("lm_head")

    def _tensor(self, name: str) -> tuple[str, list[ModuleMerge], Finding | None]:
        tensor, merged = self.base.tensors[name], self.merged.tensors[self.names[name]]
        limits.step(f"comparing the tensor {shown(name)}", merged.file)
        sites = self.sites.get(name, [])
        finding = None
        judged: list[ModuleMerge] = []
        if sites and STORED[merged.dtype].fits_float32 and STORED[tensor.dtype].fits_float32:
            judged = self._tied([self._site(site, merged) for site in sites], sites, name)
        elif sites:
            finding = not_judged(f"it is {tensor.dtype} in the base and {merged.dtype} in the merged model")
        elif (finding := untouched(tensor, merged)) is not None:
            dtype = rounded_on_the_way(tensor, merged)
            if dtype is not None:
                self.on_the_way.add(dtype)
                finding = None
        self.done += tensor.size + merged.size
        self.progress(Progress(self.done, self.total, name))
        return name, judged, finding

    def _site(self, site: Site, merged: StoredTensor) -> ModuleMerge:
        if site.kind in ("whole", "tokens"):
            return judge_replaced(site, replaced(site, self.base, merged, self.adapter), merged.dtype)
        module = judge(measure(site, self.base, merged, self.adapter), self.neighbours, tuple(self.factors))
        factor = (module.implied_scaling or 0.0) / site.scaling if site.scaling else 0.0
        if module.status == "differs" and math.isfinite(factor) and factor not in (0.0, 1.0, *self.factors):
            self.factors.append(factor)
        return module

    def _tied(self, judged: list[ModuleMerge], sites: list[Site], name: str) -> list[ModuleMerge]:
        """Warn where input and output embeddings share one matrix and the adapter changes only one of the two."""
        if not (self.base.tied and self.merged.tied) or name not in (embeddings_of(self.base), HEAD):
            return judged
        adapted = {site.key[0] for site in sites if site.kind != "tokens"}
        if len(adapted) != 1 or len(adapted | {site.key[0] for site in sites}) != 1:
            return judged
        warning = tied_changed_too(adapted.pop())
        return [replace(module, findings=(*module.findings, warning)) for module in judged]


def _of_another_base(
    modules: list[ModuleMerge], tensors: list[TensorFinding], compared: int
) -> tuple[list[ModuleMerge], list[TensorFinding]]:
    """If most untouched tensors differ: one finding for all of them, and none for modules whose change this hides."""
    differing = [tensor for tensor in tensors if tensor.finding.code == "LP708"]
    if len(differing) <= ANOTHER_BASE * compared or len(differing) < 2:
        return modules, tensors
    finding = merged_into_another_base(len(differing), compared)
    rest = [tensor for tensor in tensors if tensor.finding.code != "LP708"]
    hidden = [
        replace(module, findings=()) if {f.code for f in module.findings} <= {"LP706"} else module for module in modules
    ]
    return hidden, [TensorFinding("", finding), *rest]


def _undecided(module: ModuleMerge) -> ModuleMerge:
    """The module as undecided: the merge of its adapter cannot be replayed."""
    return replace(module, status="undecided", findings=(), implied_scaling=None)


def _doubtful(tensor: TensorFinding) -> TensorFinding:
    if tensor.finding.code not in ("LP708", "LP709", "LP710", "LP714"):
        return tensor
    why = f"{tensor.finding.message}; a part of the adapter that could not be placed may be the reason"
    return TensorFinding(tensor.name, not_judged(why))
