"""Judges adapters in separate processes, each adapter within its own budget.

In: folders, and a function that judges several of them in turn. Out: for each a `Judged` or a `NotJudged`, in order. A
folder that uses up its budget, or on which the process dies, is `NotJudged`; the others are still judged. Many folders
are judged by as many processes as there are processors, which take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_probe.checking.folders import NotJudged
from lora_probe.checking.report import Report
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.files.guarded import OverBudget, Send, fault, results
from lora_probe.files.limits import Budget
from lora_probe.files.threads import leave_to_others, processors

Check = Callable[..., Iterator[Report]]
"""`check_all` with its options; `progress` is passed as well."""
Page = Callable[[Report], Any]
MANY = 16
"""From this number of folders on, each processor has a process."""


@dataclass(frozen=True)
class Judged:
    """One adapter: its report, and its page in the output format. Data for each module is only in the page: the
    ledgers, and, if there is a page, the modules of each diagnostic."""

    report: Report
    page: Any


@dataclass(frozen=True)
class _Passing:
    """A progress message."""

    text: str


@dataclass(frozen=True)
class _Begun:
    """The next folder is being judged."""


def judged(
    folders: Sequence[Path], check: Check, page: Page | None, budget: Budget, progress: Callable[[str], None]
) -> Iterator[Judged | NotJudged]:
    """Judge `folders`. `page` is called for each report while it still has its ledgers, `progress` with messages.

    Raises:
        OverBudget: the budget was used up before the first folder, or by the only one if this process has a budget.
        ProbeError: the options or the requested base are wrong, so nothing can be judged.
    """
    if len(folders) == 1 and limits.active():
        yield from (item for item in _judge(folders, check, page, progress) if not isinstance(item, _Begun))
        return
    count = processors() if len(folders) >= MANY else 1
    work = partial(_hand_over, check=check, page=page, alone=count == 1)
    with ExitStack() as stack:
        turns = [
            # Each process starts when its first result is asked for: by then the first one has described the base.
            stack.enter_context(closing(_in_one_process(folders[number::count], work, budget, progress)))
            for number in range(count)
        ]
        for number in range(len(folders)):
            yield next(turns[number % count])
        # Without folders, this finds options that are wrong.
        for turn in turns:
            yield from turn


def _in_one_process(
    folders: Sequence[Path], work: Callable[..., None], budget: Budget, progress: Callable[[str], None]
) -> Generator[Judged | NotJudged]:
    """Judge folders one after the other, in another process after each that dies."""
    rest, begun = list(folders), False
    while True:
        try:
            for item in results(partial(work, tuple(rest)), budget):
                if isinstance(item, _Begun):
                    begun = True
                elif isinstance(item, _Passing):
                    progress(item.text)
                else:
                    rest.pop(0)
                    yield item
            return
        except OverBudget as error:
            # Before the first folder, the options or the requested base are the cause.
            if not begun or not rest:
                raise
            folder = rest.pop(0)
            yield NotJudged(folder, OverBudget(f"`{folder}`: {error.message}", error.hint))
            if not rest:
                return


def _hand_over(folders: Sequence[Path], send: Send, *, check: Check, page: Page | None, alone: bool) -> None:
    if not alone:
        leave_to_others()
    for item in _judge(folders, check, page, lambda text: send(_Passing(text))):
        send(item)


def _judge(
    folders: Sequence[Path], check: Check, page: Page | None, progress: Callable[[str], None]
) -> Iterator[Judged | NotJudged | _Begun]:
    # Wrong options are wrong for all folders: they are raised here.
    list(check((), progress=progress))
    rest = list(folders)
    while rest:
        reports = iter(check(tuple(rest), progress=progress))
        try:
            while rest:
                yield _Begun()
                report = next(reports)
                yield Judged(_lean(report, page is not None), page(report) if page is not None else None)
                rest.pop(0)
        except MemoryError:
            raise
        except Exception as error:
            folder = rest.pop(0)
            yield NotJudged(folder, error if isinstance(error, ProbeError) else _in(folder, fault(error)))


def _lean(report: Report, shown: bool) -> Report:
    diagnostics = report.diagnostics
    if shown:
        diagnostics = tuple(replace(diagnostic, modules=(), about="") for diagnostic in diagnostics)
    return replace(report, ledgers={}, diagnostics=diagnostics)


def _in(folder: Path, error: ProbeError) -> ProbeError:
    return ProbeError(f"`{folder}`: {error.message}", error.hint)
