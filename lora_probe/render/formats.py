"""The registry of output formats: which format each command has, and the function that renders it.

In: the names of a command and of a format. Out: a renderer, a function from the command's result to `Content`. The
commands and their results, also with the options that change the result's type:

    inspect           results.Inspection
    inspect --module  adapter.one_module.OneModule
    inspect A B       adapter.side_by_side.AdapterDiff
    check             results.CheckResult
    check --fix       results.CheckResult, with `run.fixed`
    check --diff      checking.renaming.Fix
    trace, show, collect  results.Recording
    show --module     Sequence[comparison.walk.Walk]
    cost              checking.cost.ServingCost
    show benchmark    recording.benchmarks.Benchmarks, for a file of pytest-benchmark
    attach            results.Attachment
    compare           comparison.Comparison
    compare adapters  comparison.Comparisons, for traces of several adapters
    parity            merging.parity.Parity
    rule              results.RuleList
    env               Mapping[str, str]

A format of this package is a file in `render/`, and its lines in `FORMATS` or its line in `FROM_DOCUMENTS`. Another
distribution adds a format, or an existing format to a command that does not have it, by an entry point in the group
`lora_probe.formats`:

    [options.entry_points]
    lora_probe.formats =
        tsv = my_formats

The entry point is a `Format`: any object, or a module such as this `my_formats`, with `name` and `renderers`:

    def check(result):
        for report in result.reports:
            for diagnostic in report.diagnostics:
                yield f"{report.adapter}\t{diagnostic.code}"

    name, renderers = "tsv", {"check": check}

Then `lora-probe check ckpt/ --format tsv` prints these lines, and `lora-probe check --help` lists the format. Other
distributions are loaded only if a format that is not ours is requested, or if all formats are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import RenderableType

from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.files.extensions import FORMATS as GROUP
from lora_probe.files.extensions import broken, described, load
from lora_probe.render.console import detail, emit
from lora_probe.render.results import Paged

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from lora_probe.render.verdicts import Verdict

DEFAULT = "text"

Content = Iterable[str] | dict[str, Any] | RenderableType
"""What is printed: a text or lines of text, a dictionary as JSON, a rich renderable as a person sees it."""
Renderer = Callable[[Any], Content] | Paged
"""A function from a command's result to its content. `check` may have a `Paged` instead."""


class Format(Protocol):
    """An output format: the name that `--format` accepts, and its renderers by command."""

    name: str
    renderers: Mapping[str, Renderer]


FORMATS: dict[str, dict[str, str]] = {
    "text": {
        "inspect": "text.inspect:inspection",
        "inspect --module": "text.one_module:module",
        "inspect A B": "text.side_by_side:side_by_side",
        "check": "text.check:CHECK",
        "check --fix": "text.check:CHECK",
        "check --diff": "text.fix:diff",
        "trace": "text.trace:recording",
        "show": "text.trace:recording",
        "show --module": "text.walk:walks",
        "show benchmark": "text.benchmarks:benchmarks",
        "collect": "text.trace:recording",
        "attach": "text.attach:attachment",
        "compare": "text.compare:comparison",
        "compare adapters": "text.compare:comparisons",
        "parity": "text.parity:parity",
        "cost": "text.cost:cost",
        "rule": "text.rule:rules",
        "env": "text.env:versions",
    },
    "json": {
        "inspect": "json.inspect:inspection_json",
        "inspect --module": "json.inspect:module_json",
        "inspect A B": "json.side_by_side:side_by_side_json",
        "check": "json.check:CHECK",
        "check --fix": "json.check:CHECK",
        "check --diff": "json.fix:diff_json",
        "trace": "json.trace:recording_json",
        "show": "json.trace:recording_json",
        "show --module": "json.walk:walks_json",
        "show benchmark": "json.benchmarks:benchmarks_json",
        "collect": "json.trace:recording_json",
        "attach": "json.attach:attachment_json",
        "compare": "json.compare:comparison_json",
        "compare adapters": "json.compare:comparisons_json",
        "parity": "json.parity:parity_json",
        "cost": "json.cost:cost_json",
        "rule": "json.rule:rules_json",
        "env": "json.env:versions_json",
    },
    "sarif": {"check": "sarif:check"},
    "github": {"check": "github:check"},
    "markdown": {"rule": "markdown:rules"},
    "csv": {
        "inspect": "csv_rows:inspection",
        "inspect A B": "csv_rows:side_by_side",
        "check": "csv_rows:CHECK",
        "check --fix": "csv_rows:CHECK",
        "trace": "csv_rows:recording",
        "show": "csv_rows:recording",
        "collect": "csv_rows:recording",
        "compare": "csv_rows:comparison",
        "compare adapters": "csv_rows:comparisons",
        "parity": "csv_rows:parity",
    },
    "chrome": {"trace": "chrome:chrome", "show": "chrome:chrome", "collect": "chrome:chrome"},
}
"""Format -> command -> renderer, as module of `lora_probe.render` and name. It is imported when it is used."""
DOCUMENTS = {
    "inspect": "documents.inspection:inspection",
    "inspect --module": "documents.inspection:one_module",
    "inspect A B": "documents.inspection:side_by_side",
    "check": "documents.report:CHECK",
    "check --fix": "documents.report:CHECK",
    "trace": "documents.recording:recording",
    "show": "documents.recording:recording",
    "show benchmark": "documents.benchmarks:benchmarks",
    "collect": "documents.recording:recording",
    "compare": "documents.comparison:comparison",
    "compare adapters": "documents.comparison:comparisons",
    "parity": "documents.merge:parity",
    "cost": "documents.cost:cost",
}
"""Command -> the function that makes a `Document` of its result."""
FROM_DOCUMENTS = {"html": "html:page", "markdown": "document_markdown:markdown", "junit": "junit:junit"}
"""Format -> the function that makes its text of a `Document`."""
VERDICTS = {
    "inspect": "verdicts:of_inspection",
    "inspect A B": "verdicts:of_diff",
    "inspect --module": "verdicts:of_module",
    "check": "verdicts:of_check",
    "check --fix": "verdicts:of_check",
    "trace": "verdicts:of_recording",
    "show": "verdicts:of_recording",
    "show benchmark": "verdicts:of_benchmarks",
    "collect": "verdicts:of_recording",
    "compare": "verdicts:in_short",
    "compare adapters": "verdicts:of_comparisons",
    "parity": "verdicts:of_parity",
    "cost": "verdicts:of_cost",
}
"""Command -> the function that gives the verdict of its result: what `--quiet` prints."""
ERRORS = {"json": "json.error:error_json", "sarif": "sarif:error", "github": "github:error"}
"""Format -> renderer of the error with which a command ends. Standard error has it in any case."""
COMMANDS = frozenset(FORMATS[DEFAULT])


class Names:
    """The formats of a command, as choices for argparse. A format of this package is found without a search for other
    distributions."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __contains__(self, name: object) -> bool:
        return self._command in _ours(str(name)) or (self._command, name) in _installed()

    def __iter__(self) -> Iterator[str]:
        yield from names_of(self._command)
        yield from sorted(name for command, name in _installed() if command == self._command)


def names_of(command: str) -> list[str]:
    """The formats of a command in this package."""
    return [name for name in dict.fromkeys((*FORMATS, *FROM_DOCUMENTS)) if command in _ours(name)]


def _ours(name: str) -> set[str]:
    """The commands for which this package has a format."""
    return {*FORMATS.get(name, ()), *(DOCUMENTS if name in FROM_DOCUMENTS else ())}


def renderer(command: str, name: str) -> Renderer:
    """The renderer of a command's result.

    Raises:
        ProbeError: the command does not have this format, or its distribution cannot be loaded.
    """
    if place := FORMATS.get(name, {}).get(command):
        function: Renderer = _imported(place)
        return function
    if name in FROM_DOCUMENTS and command in DOCUMENTS:
        return _written(_imported(DOCUMENTS[command]), _imported(FROM_DOCUMENTS[name]))
    if (command, name) not in _installed():
        raise ProbeError(
            f"`--format {name}` is not available for `{command}`", f"available formats: {', '.join(Names(command))}"
        )
    return _installed()[command, name]


def _written(make: Any, write: Callable[[Any], str]) -> Renderer:
    """A renderer by way of a document. The documents of `check` are made one by one."""
    if isinstance(make, Paged):
        return Paged(make.page, partial(_through, make.whole, write))
    return partial(_through, make, write)


def _through(make: Callable[[Any], Any], write: Callable[[Any], str], result: Any) -> str:
    return write(make(result))


def present(command: str, name: str, result: Any) -> None:
    """Print a command's result, with `--quiet` only its verdict. Raises as `renderer` does."""
    if name == DEFAULT and detail() == "quiet" and command in VERDICTS:
        verdict: Verdict = _imported(VERDICTS[command])(result)
        emit(verdict.line)
        return
    chosen = renderer(command, name)
    emit((chosen.whole if isinstance(chosen, Paged) else chosen)(result))


def present_error(name: str, error: ProbeError) -> None:
    """Print the error with which a command ends, in a format that programs read. Other formats print nothing."""
    if place := ERRORS.get(name):
        emit(_imported(place)(error))


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    with limits.importing():
        return getattr(import_module(f"{__package__}.{module}"), attribute)


@cache
def _installed() -> Mapping[tuple[str, str], Renderer]:
    """The renderers of other distributions by command and format."""
    from importlib.metadata import entry_points

    renderers: dict[tuple[str, str], Renderer] = {}
    owners: dict[tuple[str, str], str] = {}
    for point in entry_points(group=GROUP):
        name, functions = _loaded(point)
        for command, function in functions.items():
            key = command, name
            if command in _ours(name) or key in owners:
                owner = owners.get(key, "lora-probe itself")
                raise broken(point, f"`{command}` already has a format `{name}`, from {owner}")
            owners[key] = described(point)
            renderers[key] = _blamed(point, function)
    return renderers


def _loaded(point: EntryPoint) -> tuple[str, Mapping[str, Renderer]]:
    """The format of an entry point, validated."""
    with limits.importing():
        loaded = load(point)
    name, renderers = getattr(loaded, "name", None), getattr(loaded, "renderers", None)
    if not isinstance(name, str) or not name or not isinstance(renderers, Mapping):
        raise broken(point, "a format needs a `name` and a mapping `renderers`: see lora_probe/render/formats.py")
    for command, function in renderers.items():
        if command not in COMMANDS or not (callable(function) or isinstance(function, Paged)):
            expected = f"expected a function for one of {', '.join(sorted(COMMANDS))}"
            raise broken(point, f"`renderers` maps `{command}` to `{function!r}`: {expected}")
    return name, renderers


@contextmanager
def _blaming(point: EntryPoint) -> Iterator[None]:
    """Report errors in the code of another distribution as its own."""
    try:
        yield
    except (ProbeError, MemoryError):
        raise
    except Exception as error:
        raise broken(point, f"{type(error).__name__}: {error}", "render with") from error


def _blamed(point: EntryPoint, function: Renderer) -> Renderer:
    if isinstance(function, Paged):
        return Paged(partial(_call, point, function.page), partial(_rendered, point, function.whole))
    return partial(_rendered, point, function)


def _call(point: EntryPoint, function: Callable[..., Any], *arguments: Any) -> Any:
    with _blaming(point):
        return function(*arguments)


def _rendered(point: EntryPoint, function: Callable[..., Content], result: Any) -> Content:
    content = _call(point, function, result)
    # The code of a generator runs when its lines are printed.
    return _lines(point, content) if isinstance(content, Iterator) else content


def _lines(point: EntryPoint, lines: Iterator[str]) -> Iterator[str]:
    with _blaming(point):
        yield from lines
