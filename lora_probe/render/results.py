"""What each command hands to an output format.

In: what the core found, and the options that decide what is shown. Out: one type per command; `formats.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A command pays only for what it uses.
    from lora_probe.adapter import Adapter
    from lora_probe.adapter.spectrum import Spectrum
    from lora_probe.checking import Report
    from lora_probe.checking.folders import NotJudged
    from lora_probe.checking.renaming import Fix
    from lora_probe.comparison.recorded import AdapterLoads
    from lora_probe.recording import Trace
    from lora_probe.rules import Rule


@dataclass(frozen=True)
class Inspection:
    """`inspect`. `spectra` are by the modules' names in the file: None for a module whose A and B do not form a pair,
    and None altogether without `--norms`."""

    adapter: Adapter
    spectra: Mapping[str, Spectrum | None] | None = None


@dataclass(frozen=True)
class FixResult:
    """What `check --fix` did. `folder` is the value of `--output`, `not_copied` are names of files."""

    fix: Fix
    folder: str
    not_copied: tuple[str, ...]


@dataclass(frozen=True)
class CheckRun:
    """What is known about a run of `check` before the first adapter is read.

    `adapters` is how many there are, and `single` whether the command line names one folder, without `--recursive`.
    `verbose`: of several adapters, the findings of each are shown, not only its row.
    """

    adapters: int
    single: bool
    fixed: FixResult | None = None
    verbose: bool = False


@dataclass(frozen=True)
class CheckResult:
    """`check`, and `check --fix`.

    `reports` have no ledgers: for thousands of adapters these would not fit into memory. `pages` are what the format's
    `Paged.page` returned for each report; if the format has pages, the reports' diagnostics have no modules either.
    """

    run: CheckRun
    reports: Sequence[Report]
    pages: Iterable[Any]
    not_judged: Sequence[NotJudged]


@dataclass(frozen=True)
class Paged:
    """A renderer of `check` that shows ledgers.

    `page` is called for each report in the process that reads the adapters, while its ledgers exist. What it returns
    must be picklable: it waits on disk until all adapters are read. `whole` then renders all pages.
    """

    page: Callable[[Report, CheckRun], Any]
    whole: Callable[[CheckResult], Any]


@dataclass(frozen=True)
class Recording:
    """`trace` and `show`. `events` is whether every step of the load timeline is shown; `adapter` and `load` are all
    that is shown if they are not None; `requests` is whether the rows of requests are shown instead of contributions;
    `everything` is whether long lists of loads and requests are shown to their end."""

    trace: Trace
    events: bool = False
    adapter: str | None = None
    load: int | None = None
    requests: bool = False
    everything: bool = False

    @cached_property
    def adapters(self) -> tuple[AdapterLoads, ...]:
        """What is shown of the trace.

        Raises:
            ProbeError: it does not have the requested adapter or load.
        """
        from lora_probe.comparison.recorded import adapters, selected

        return selected(adapters(self.trace), self.adapter, self.load)

    @property
    def whole(self) -> bool:
        """Whether nothing is left out on request."""
        return self.adapter is None and self.load is None and not self.requests


@dataclass(frozen=True)
class Worker:
    """A worker that answered `attach`: its level until now, and why it records no contributions, if it does not."""

    name: str
    before: str
    not_recorded: str | None


@dataclass(frozen=True)
class Attachment:
    """`attach`. `keep` is the level that all workers record from their next step on."""

    trace: str
    keep: str
    workers: tuple[Worker, ...]


@dataclass(frozen=True)
class RuleList:
    """`rule`. `pages` is whether the page of every rule is shown, not one line per rule."""

    rules: Sequence[Rule]
    pages: bool
