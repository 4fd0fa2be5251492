"""`inspect` as text: what an adapter checkpoint contains, from its headers, and with `--norms` from its values.

In: an `Inspection`. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text as RichText

from lora_probe.adapter import Adapter
from lora_probe.adapter.variants import EXTRAS
from lora_probe.names import Key, ShortName, in_layer, in_text, natural, one_or_more, path_of, ranges, short_names
from lora_probe.render.cells import size, words
from lora_probe.render.results import Inspection
from lora_probe.render.tables import Facts, Fitted, Grid, add_row, columns_of
from lora_probe.render.towers import Cell
from lora_probe.render.verdicts import of_inspection

if TYPE_CHECKING:
    from lora_probe.adapter.spectrum import Spectrum

NORMS = "‖ΔW‖ = ‖s·B·A‖, and its effective rank r"


def inspection(result: Inspection) -> RenderableType:
    """The checkpoint, and the norms if they were read."""
    parts: list[RenderableType] = [of_inspection(result).line, words("")]
    if result.spectra is not None:
        parts += [Grid(NORMS, norms(result.adapter, result.spectra)), words("")]
    return Group(
        *parts,
        by_projection(result.adapter),
        *other_tensors(result.adapter),
        words(""),
        Facts(*facts_of(result.adapter)),
    )


def facts_of(adapter: Adapter) -> tuple[tuple[str, str], ...]:
    """The folder and what its config states."""
    config = adapter.config
    dtypes = ", ".join(adapter.dtypes) or "empty"
    return (
        ("adapter", str(adapter.path)),
        ("kind", f"{config.kind}, rank {config.rank}, alpha {config.alpha:g}, scaling {config.scaling:g}"),
        ("base model", config.base_model or "not set in the config"),
        ("PEFT", config.peft_version or "version not in the config (older than 0.18)"),
        ("targets", _targets(adapter)),
        ("size", f"{size(adapter.weights.size)}, {adapter.parameters:,} parameters, {dtypes}"),
        ("modules", f"{len(adapter.modules)} in {len(adapter.weights.tensors)} tensors"),
    )


def _targets(adapter: Adapter) -> str:
    targets = adapter.config.target_modules
    if targets is None:
        return "none"
    return f"regular expression {targets}" if isinstance(targets, str) else ", ".join(sorted(targets, key=natural))


def by_projection(adapter: Adapter) -> Fitted:
    table = columns_of("projection", "modules", "layers", "A", "B", "rank", "scaling", "dtype")
    names = short_names(path_of(module.key) for module in adapter.modules)
    groups: dict[tuple[tuple[str, ...], str, tuple[str, ...]], list[ShortName]] = {}
    for module in adapter.modules:
        name = names[path_of(module.key)]
        pair = (module.a, module.b)
        shapes = tuple("missing" if t is None else "×".join(map(str, t.shape)) or "scalar" for t in pair)
        dtypes = ", ".join(dict.fromkeys(t.dtype for t in pair if t is not None))
        cells = (*shapes, str(module.rank), f"{module.scaling:g}", dtypes)
        groups.setdefault((name.words, name.name, cells), []).append(name)
    # Modules outside of all layers come last.
    for path, end, cells in sorted(groups, key=lambda group: (not group[0], group[0][:1], natural(group[1]))):
        members = groups[path, end, cells]
        projection = in_text(in_layer(name) for name in members)
        add_row(table, projection, str(len(members)), _layers(members), *cells)
    return table


def _layers(names: Sequence[ShortName]) -> str:
    """The layers of modules that have the same words: `0-29`, of several lists `encoder layers 0-11`."""
    if not names[0].words:
        return "-"
    numbers = [name.numbers[0] for name in names]
    word = one_or_more(names[0].words[0], len(set(numbers)))
    return ranges(numbers) if word in ("layer", "layers") else f"{word} {ranges(numbers)}"


def other_tensors(adapter: Adapter) -> Iterable[RichText]:
    """Everything in the folder that is not lora_A or lora_B."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for other in adapter.others:
        kinds.setdefault((other.what, other.understood), []).append(other.tensor.name)
    for module in adapter.modules:
        for extra in module.extras:
            what = next((kind.plural for kind in EXTRAS.values() if kind.is_named(extra.name)), "not understood")
            kinds.setdefault((what, True), []).append(extra.name)
    for (what, understood), names in kinds.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        style = "" if understood else "bold yellow"
        yield words(f"{len(names)} other tensors: {what}: {shown}", style=style)
    if adapter.files:
        yield words(f"also in the folder: {', '.join(adapter.files)}", style="dim")


def norms(adapter: Adapter, spectra: Mapping[str, Spectrum | None]) -> dict[Key, Cell]:
    """‖ΔW‖ and the effective rank of each module."""
    cells = {}
    for module in adapter.modules:
        spectrum = spectra[module.stored_as]
        if spectrum is None:
            cells[module.key] = Cell("not a pair", bad=True)
        elif not spectrum.finite:
            cells[module.key] = Cell("not finite", bad=True)
        else:
            cells[module.key] = Cell(f"{spectrum.norm:.3g} r {spectrum.effective_rank:.1f}", spectrum.norm)
    return cells
