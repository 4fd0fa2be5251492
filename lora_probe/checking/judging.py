"""Adapters judged one after the other, in a process of their own, each within a budget of its own.

In: folders, and a function that judges several of them in turn. Out: for each a `Judged` or a `Lost`, in their order. A
folder that uses up its budget, or on which the process dies, is lost; the others are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_probe.checking.check import Report
from lora_probe.checking.folders import Lost
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.files.guarded import OverBudget, Send, fault, results
from lora_probe.files.limits import Budget

Check = Callable[..., Iterator[Report]]
"""`check_all` with its options; `progress` is passed as well."""
Page = Callable[[Report], Any]


@dataclass(frozen=True)
class Judged:
    """One adapter: its report, and what a format makes of it. What has an entry for every module is in the page alone:
    the ledgers, and with a page the modules of each finding."""

    report: Report
    page: Any


@dataclass(frozen=True)
class _Passing:
    """What goes on at the moment."""

    text: str


@dataclass(frozen=True)
class _Begun:
    """The next folder is looked at."""


def judged(
    folders: Sequence[Path], check: Check, page: Page | None, budget: Budget, tell: Callable[[str], None]
) -> Iterator[Judged | Lost]:
    """Judge `folders`; `page` is called for each report where the ledgers still are, `tell` with what goes on.

    Raises:
        OverBudget: as below, or one folder alone was too much for this process, which has a budget itself.
        ProbeError: the options or the base that was asked for are wrong, so that nothing can be judged.
    """
    rest = list(folders)
    if len(rest) == 1 and limits.active():
        yield from (item for item in _judge(rest, check, page, tell) if not isinstance(item, _Begun))
        return
    begun = False
    while True:
        try:
            for item in results(partial(_hand_over, tuple(rest), check, page), budget):
                if isinstance(item, _Begun):
                    begun = True
                elif isinstance(item, _Passing):
                    tell(item.text)
                else:
                    rest.pop(0)
                    yield item
            return
        except OverBudget as error:
            # Before the first folder it is the options or the base that was asked for.
            if not begun or not rest:
                raise
            folder = rest.pop(0)
            yield Lost(folder, OverBudget(f"`{folder}`: {error.message}", error.hint))
            if not rest:
                return


def _hand_over(folders: Sequence[Path], check: Check, page: Page | None, send: Send) -> None:
    for item in _judge(folders, check, page, lambda text: send(_Passing(text))):
        send(item)


def _judge(
    folders: Sequence[Path], check: Check, page: Page | None, tell: Callable[[str], None]
) -> Iterator[Judged | Lost | _Begun]:
    # What is wrong with the options is wrong for all, and raised here.
    list(check((), progress=tell))
    rest = list(folders)
    while rest:
        reports = iter(check(tuple(rest), progress=tell))
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
            yield Lost(folder, error if isinstance(error, ProbeError) else _in(folder, fault(error)))


def _lean(report: Report, shown: bool) -> Report:
    found = tuple(replace(one, modules=()) for one in report.diagnostics) if shown else report.diagnostics
    return replace(report, ledgers={}, diagnostics=found)


def _in(folder: Path, error: ProbeError) -> ProbeError:
    return ProbeError(f"`{folder}`: {error.message}", error.hint)
