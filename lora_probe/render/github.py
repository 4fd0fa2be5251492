"""Diagnostics as GitHub's workflow commands: annotations on the files of a pull request.

In: reports. Out: lines for standard output, one per diagnostic, such as
`::error file=ckpt/adapter_config.json,line=12,title=LP201 rank-differs-from-config::r=8 in the config ...`.
A name in a file can end neither a line nor a property, so it cannot start a command.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_probe.checking import Report
from lora_probe.errors import ProbeError
from lora_probe.render.cells import CONTROL, one_line
from lora_probe.render.places import file_of, relative
from lora_probe.render.results import CheckResult
from lora_probe.rules import Diagnostic, Severity
from lora_probe.rules.codes import in_ranges

COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}


def check(result: CheckResult) -> Iterator[str]:
    """A line for each diagnostic, then for each reason why rules were not run, then for each folder not judged."""
    for report in result.reports:
        yield from (_annotation(report, diagnostic) for diagnostic in report.diagnostics)
        for skipped in report.not_run:
            title = f"not run on {relative(report.adapter)}"
            yield command("notice", f"{in_ranges(skipped.codes)}: {skipped.why}", title=title)
    for lost in result.not_judged:
        yield error(lost.error)


def error(error: ProbeError) -> str:
    """A line for the error of a folder that was not judged, or of a call that judged nothing."""
    return command("error", error.message, title="not judged")


def _annotation(report: Report, diagnostic: Diagnostic) -> str:
    properties = {"file": relative(file_of(report, diagnostic))}
    if diagnostic.line is not None:
        properties["line"] = str(diagnostic.line)
    properties["title"] = f"{diagnostic.code} {diagnostic.name}"
    lines = [one_line(diagnostic.message), one_line(f"hint: {diagnostic.hint}") if diagnostic.hint else ""]
    message = "\n".join(filter(None, lines))
    return command(COMMANDS[diagnostic.severity], message, **properties)


def command(name: str, message: str, **properties: str) -> str:
    """A workflow command, escaped as GitHub's own toolkit escapes it, and without control characters."""
    pairs = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name} {pairs}::{_data(message)}"


def _data(text: str) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace("##[", "## [").translate(CONTROL)


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
