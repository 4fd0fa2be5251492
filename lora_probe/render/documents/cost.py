"""The document of what an adapter costs to serve. In: a `ServingCost`. Out: a `Document`."""

from __future__ import annotations

from lora_probe.checking.cost import ServingCost
from lora_probe.errors import command_line
from lora_probe.render.document import Document, Lines, Section
from lora_probe.render.text.cost import advice, facts, tables
from lora_probe.render.verdicts import of_cost


def cost(result: ServingCost) -> Document:
    verdict = of_cost(result)
    sections: list[Section] = [Lines("What to do", (*advice(result), *result.notes)), *tables(result)]
    title = command_line(["cost", str(result.path)])
    return Document(title, verdict.text, verdict.tone, facts=facts(result), sections=tuple(sections))
