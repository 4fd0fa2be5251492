"""JUnit XML, which CI servers show as tests: a case for each adapter that was checked, and one for any other result.

In: a `Document`. Out: XML. A case fails with its findings; what could not be judged is an error of the case.
"""

from __future__ import annotations

from xml.etree import ElementTree

from lora_probe.render.cells import one_line
from lora_probe.render.document import Document, Finding


def junit(document: Document) -> str:
    """One suite."""
    cases = document.parts or (document,)
    failed, unjudged = (sum(case.tone == tone for case in cases) for tone in ("bad", "open"))
    command = document.title.partition(" ")[0]
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": str(unjudged)}
    suite = ElementTree.Element("testsuite", {"name": f"lora-probe {command}"} | counts)
    for case in cases:
        _add(suite, case, command)
    ElementTree.indent(suite)
    # As references, all characters survive any encoding of standard output.
    text = ElementTree.tostring(suite, encoding="unicode").encode("ascii", "xmlcharrefreplace").decode()
    return f"<?xml version='1.0' encoding='utf-8'?>\n{text}"


def _add(suite: ElementTree.Element, document: Document, command: str) -> None:
    name = one_line(document.title.partition(" ")[2] or command)
    case = ElementTree.SubElement(suite, "testcase", {"classname": f"lora-probe.{command}", "name": name})
    verdict = one_line(document.verdict)
    told = "\n".join(map(_told, document.findings))
    if document.tone in ("bad", "open"):
        kind = "failure" if document.tone == "bad" else "error"
        ElementTree.SubElement(case, kind, {"message": verdict}).text = told
    else:
        ElementTree.SubElement(case, "system-out").text = f"{verdict}\n{told}".rstrip()


def _told(finding: Finding) -> str:
    lines = [f"{finding.severity} {finding.code} {finding.name}: {finding.message}", *finding.details]
    return "\n".join(map(one_line, [*lines, *([f"hint: {finding.hint}"] if finding.hint else [])]))
