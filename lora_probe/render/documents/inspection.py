"""The document of `inspect`: an adapter, one of its modules, or two adapters.

In: an `Inspection`, a `OneModule`, an `AdapterDiff`. Out: a `Document`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_probe.errors import command_line
from lora_probe.names import name_modules, path_of
from lora_probe.render.document import Curves, Document, Lines, Section, Table, heats
from lora_probe.render.documents.parts import lines_of, table_of
from lora_probe.render.text.inspect import by_projection, facts_of, norms, other_tensors
from lora_probe.render.text.one_module import facts_of as facts_of_module
from lora_probe.render.text.one_module import tensors
from lora_probe.render.text.side_by_side import COLUMNS, cells_of, closeness, distances, fields
from lora_probe.render.towers import Cell, number
from lora_probe.render.verdicts import of_diff, of_inspection, of_module

if TYPE_CHECKING:
    from lora_probe.adapter import Adapter
    from lora_probe.adapter.one_module import OneModule
    from lora_probe.adapter.side_by_side import AdapterDiff
    from lora_probe.adapter.spectrum import Spectrum
    from lora_probe.render.results import Inspection

POINTS = 24
"""Of a spectrum at most so many values are drawn."""


def inspection(result: Inspection) -> Document:
    """What the checkpoint contains; with its norms, heat maps and spectra."""
    verdict, adapter = of_inspection(result), result.adapter
    sections: list[Section] = []
    if result.spectra is not None:
        sections += _values(adapter, result.spectra)
    else:
        ranks = {module.key: number(module.rank) for module in adapter.modules}
        scalings = {module.key: number(module.scaling) for module in adapter.modules}
        sections += heats("Modules", {"rank": ranks, "scaling": scalings})
    sections.append(table_of("Projections", by_projection(adapter)))
    sections += lines_of("Other tensors and files", other_tensors(adapter))
    return Document(
        command_line(["inspect", str(adapter.path)]), verdict.text, verdict.tone, (), facts_of(adapter), tuple(sections)
    )


def _values(adapter: Adapter, spectra: Mapping[str, Spectrum | None]) -> Iterator[Section]:
    """Norm, effective rank, rank and scaling of each module, and the spectrum of its ΔW."""
    known = [(module, spectra[module.stored_as]) for module in adapter.modules]
    finite = [(module, spectrum) for module, spectrum in known if spectrum is not None and spectrum.finite]
    wrong = {key: cell for key, cell in norms(adapter, spectra).items() if cell.bad}
    measures = {
        "‖ΔW‖": wrong | {module.key: number(spectrum.norm) for module, spectrum in finite},
        "effective rank": wrong | {module.key: number(spectrum.effective_rank) for module, spectrum in finite},
        "rank": {module.key: number(module.rank) for module in adapter.modules},
        "scaling": {module.key: number(module.scaling) for module in adapter.modules},
    }
    yield from heats("ΔW = s·B·A of each module", measures)
    items = []
    for module, spectrum in finite:
        values = spectrum.singular[:: max(1, -(-len(spectrum.singular) // POINTS))]
        items.append((name_modules([path_of(module.key)]), tuple(float(value) for value in values)))
    yield Curves("Spectra", "Singular values of ΔW, from the largest to the smallest.", tuple(items))


def one_module(selected: OneModule) -> Document:
    """One module with its values."""
    verdict, name = of_module(selected), path_of(selected.module.key)
    sections: list[Section] = [table_of("Tensors", tensors(selected))]
    if selected.spectrum is not None and selected.spectrum.finite:
        values = tuple(map(float, selected.spectrum.singular))
        sections.append(Curves("Spectrum", "Singular values of ΔW.", ((name, values),)))
        sections.append(Lines("Singular values", (", ".join(f"{value:.6g}" for value in values),)))
    return Document(f"inspect {name}", verdict.text, verdict.tone, (), facts_of_module(selected), tuple(sections))


def side_by_side(diff: AdapterDiff) -> Document:
    """Two adapters: the relation of each module."""
    verdict = of_diff(diff)
    related = [(pair, pair.relation) for pair in diff.modules if pair.relation and pair.relation.finite]
    measures = {
        "distance": distances(diff),
        "cosine": {pair.key: number(pair.cosine, 4) for pair, _ in related},
        "factor": {pair.key: number(relation.factor, 4) for pair, relation in related},
        "shared rows of A": {pair.key: number(relation.shared_rows) for pair, relation in related},
        "shared columns of B": {pair.key: number(relation.shared_columns) for pair, relation in related},
        "how": {pair.key: Cell(pair.kind, bad=pair.kind == "unread") for pair in diff.modules},
    }
    about = "distance: ‖ΔW₂ - ΔW₁‖ / ‖ΔW₁‖; shared: above what two random adapters have, 1 is all of it."
    sections: list[Section] = [*([table_of("Fields of the configs that differ", fields(diff))] if diff.fields else [])]
    sections += heats("Relation of each ΔW", measures, about)
    differing = sorted((pair for pair in diff.modules if not pair.alike), key=closeness)
    alike = [pair for pair in diff.modules if pair.alike]
    rows = tuple(cells_of(pair) for pair in (*differing, *alike))
    sections.append(Table("Modules, the furthest apart first", COLUMNS, rows))
    facts = ("first", str(diff.first.path)), ("second", str(diff.second.path))
    title = command_line(["inspect", facts[0][1], facts[1][1]])
    return Document(title, verdict.text, verdict.tone, (), facts, tuple(sections))
