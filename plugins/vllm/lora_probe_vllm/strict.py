"""Strict mode: an adapter that does not take effect as a whole is refused when it is loaded (`LORA_PROBE_STRICT=1`).

In: when vLLM's own call to load an adapter begins and ends, and the ledger of the load at `read` and `placed`. Out: an
exception that vLLM returns to whoever requested the load; or, where an exception would end the engine, an event and a
log line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from weakref import WeakSet

from lora_probe.engines.load_record import LoadRecord
from lora_probe.ledger import OK, Ledger, Row, Station, headline
from lora_probe_vllm import STRICT, switched_on
from lora_probe_vllm.loads import ActiveLoad

LOADING: tuple[Station, ...] = ("read", "placed")
"""The stations that are judged while vLLM loads an adapter. What is wrong at `stored` is the file's, not vLLM's."""


class AdapterRefused(ValueError):
    """Strict mode refuses the adapter. The message is the cause."""


class Strict:
    """Whether an adapter is refused now. vLLM also loads adapters inside a step, where no exception may be raised."""

    def __init__(self, guard: Callable[[str], AbstractContextManager[None]]) -> None:
        self.enabled = switched_on(STRICT)
        self._guard = guard
        self._refusing = False
        self._reported: WeakSet[LoadRecord] = WeakSet()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """vLLM's call to load an adapter, which may fail."""
        self._refusing = self.enabled
        try:
            yield
        finally:
            self._refusing = False

    def after_reading(self, active: ActiveLoad) -> None:
        """Refuse an adapter before vLLM removes another one for it.

        Raises:
            AdapterRefused: a module was lost at `read`, or has no LoRA layer.
        """
        if self._refusing:
            self._refuse(active, self._reason(active, as_predicted=True))

    def after_placing(self, active: ActiveLoad) -> None:
        """Refuse an adapter whose slot has been filled.

        Raises:
            AdapterRefused: a module is lost or wrong.
        """
        if self._refusing:
            self._refuse(active, self._reason(active))

    def in_slot(self, active: ActiveLoad) -> None:
        """Report, once for each load, an adapter that was read inside a step and would have been refused."""
        if not self.enabled or self._refusing or active.record in self._reported:
            return
        if (reason := self._reason(active)) is not None:
            self._reported.add(active.record)
            text = f"served although {STRICT}=1, because it was read inside a step: {reason}"
            logging.getLogger("vllm.lora_probe").error("%s: %s", active.record.load.name, text)
            active.record.event("strict", text)

    def _refuse(self, active: ActiveLoad, reason: str | None) -> None:
        if reason is None:
            return
        with self._guard("a refusal"):
            active.record.event("refused", f"{STRICT}=1: {reason}")
            active.record.refused(f"{STRICT}=1: {reason}")
        raise AdapterRefused(f"lora-probe refuses the adapter `{active.record.load.name}`: {reason}")

    def _reason(self, active: ActiveLoad, as_predicted: bool = False) -> str | None:
        """The headline of an adapter of which a module is lost or wrong at `read` or `placed`; None if none is.

        `as_predicted`: the slot is not filled yet, so a module with a LoRA layer counts as placed.
        """
        with self._guard("judging the adapter"):
            rows = active.record.ledger("vllm", ("stored", *LOADING)).rows
            if any(map(_lost_by_loading, rows)):
                rows = tuple(_placed(row, active) for row in rows) if as_predicted else rows
                return headline(Ledger("vllm", rows, predicted=True))
        return None


def _lost_by_loading(row: Row) -> bool:
    """Whether vLLM lost the module or changed it. `unknown` is no reason to refuse."""
    values = {station: row.stations[station].value for station in LOADING}
    return row.stations["stored"].value != "absent" and not {"absent", "wrong"}.isdisjoint(values.values())


def _placed(row: Row, active: ActiveLoad) -> Row:
    home = active.homes.get(row.key)
    if row.stations["placed"].value != "unknown" or home is None or not home.recordable:
        return row
    return replace(row, stations={**row.stations, "placed": OK})
