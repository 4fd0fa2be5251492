"""The document of a saved benchmark. In: `Benchmarks`. Out: a `Document`."""

from __future__ import annotations

from lora_probe.errors import command_line
from lora_probe.recording.benchmarks import Benchmarks
from lora_probe.render.document import Document
from lora_probe.render.text.benchmarks import facts, tables
from lora_probe.render.verdicts import of_benchmarks


def benchmarks(result: Benchmarks) -> Document:
    verdict = of_benchmarks(result)
    title = command_line(["show", str(result.path)]) if result.path is not None else "benchmarks"
    return Document(title, verdict.text, verdict.tone, facts=facts(result), sections=tables(result))
