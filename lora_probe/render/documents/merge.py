"""The document of `parity`: a merge in the weights and in the outputs.

In: a `Parity`. Out: a `Document`.
"""

from __future__ import annotations

from lora_probe.errors import command_line
from lora_probe.merging.parity import Parity
from lora_probe.names import Key
from lora_probe.render.document import Document, Lines, Section, heats
from lora_probe.render.documents.parts import finding_of, lines_of, table_of
from lora_probe.render.text.parity import counts, facts_of, outputs_lines, outputs_table, shares
from lora_probe.render.towers import Cell, number
from lora_probe.render.verdicts import of_parity


def parity(result: Parity) -> Document:
    """The weights, then the outputs."""
    verdict, weights = of_parity(result), result.weights
    kept: dict[Key, Cell] = {}
    residual: dict[Key, Cell] = {}
    for module in weights.modules:
        key = module.label.partition("[")[0], "weight", None
        kept.setdefault(key, number(module.effect_kept))
        residual.setdefault(key, number(module.residual))
    measures = {"share of ΔW": shares(weights), "effect kept": kept, "residual": residual}
    sections: list[Section] = [*heats("ΔW in the merged weights", measures, "1: all of it. Experts: the worst one.")]
    sections += lines_of("Weights", counts(weights))
    if result.outputs is not None:
        sections.append(table_of("Outputs on the unmerged adapter's own answers", outputs_table(result.outputs)))
        sections += lines_of("Outputs", outputs_lines(result.outputs, weights))
    if result.warnings:
        sections.append(Lines("Warnings of PEFT", tuple(result.warnings)))
    findings = tuple(map(finding_of, result.diagnostics))
    title = command_line(["parity", str(weights.adapter)])
    return Document(title, verdict.text, verdict.tone, findings, facts_of(result), tuple(sections))
