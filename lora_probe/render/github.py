"""Findings as GitHub's workflow commands: annotations at the files of a pull request.

In: reports. Out: lines for standard output, one a finding, as
`::error file=ckpt/adapter_config.json,line=12,title=LP201 rank-differs-from-config::r=8 in the config ...`.
What stands in a file's names can neither end a line nor a property, and so begins no command of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lora_probe.checking import Report
from lora_probe.checking.folders import NotJudged
from lora_probe.render.cells import CONTROL, one_line
from lora_probe.render.places import file_of, relative
from lora_probe.rules import Diagnostic, Severity

COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}


def commands(found: Iterable[Report], lost: Sequence[NotJudged] = ()) -> Iterator[str]:
    """A line for each finding, then for each reason why rules were not run, then for what was not judged."""
    for report in found:
        yield from (_finding(report, diagnostic) for diagnostic in report.diagnostics)
        for one in report.not_run:
            title = f"not run on {relative(report.adapter)}"
            yield command("notice", f"{', '.join(one.codes)}: {one.why}", title=title)
    for missing in lost:
        yield command("error", missing.error.message, title="not judged")


def _finding(report: Report, diagnostic: Diagnostic) -> str:
    properties = {"file": relative(file_of(report, diagnostic))}
    if diagnostic.line is not None:
        properties["line"] = str(diagnostic.line)
    properties["title"] = f"{diagnostic.code} {diagnostic.name}"
    lines = [one_line(diagnostic.message), one_line(f"hint: {diagnostic.hint}") if diagnostic.hint else ""]
    message = "\n".join(filter(None, lines))
    return command(COMMANDS[diagnostic.severity], message, **properties)


def command(name: str, message: str, **properties: str) -> str:
    """A workflow command, escaped as GitHub's own toolkit escapes it, and without control characters."""
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name} {given}::{_data(message)}"


def _data(text: str) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace("##[", "## [").translate(CONTROL)


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
