"""lora-probe's metrics in vLLM's own `/metrics` (`LORA_PROBE_METRICS=1`).

In: the loads of a worker, with their ledgers and counters. Out: samples in files of prometheus_client's multi-process
mode, which the API server, another process, reads when it is scraped. Each worker replaces its files as a whole, so a
load that has ended leaves no series behind.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

from lora_probe.engines.load_record import LoadRecord
from lora_probe.ledger import Fate

SHARED, OWN = "PROMETHEUS_MULTIPROC_DIR", "LORA_PROBE_METRICS_DIR"
"""The folder of vLLM's own multi-process metrics, which it has only with several API servers; and ours otherwise. The
processes that the server starts inherit both variables."""
STATES: dict[Fate, str] = {"took effect": "took_effect", "lost": "lost", "wrong": "wrong", "unknown": "unknown"}
MODULES = "lora_probe_modules"
CONTAMINATED, STALE = "lora_probe_contaminated_rows", "lora_probe_stale_rows"
HELP = {
    MODULES: "Modules of a loaded LoRA adapter by what became of them.",
    CONTAMINATED: "Rows that did not request this adapter and got its contribution.",
    STALE: "Rows that requested this adapter and ran with a slot that does not hold it.",
}

_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by the name of the metric and its labels."""


def add_to_server() -> None:
    """Let this process's `/metrics` contain the samples of the workers that it will start.

    It is called in every process of vLLM, and does something in the first, before there are workers. With several API
    servers vLLM itself collects all files of its folder.
    """
    if os.environ.get(SHARED) or os.environ.get(OWN):
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = tempfile.mkdtemp(prefix="lora-probe-metrics-")
    atexit.register(_remove, folder, os.getpid())
    os.environ[OWN] = folder
    MultiProcessCollector(REGISTRY, folder)


def _remove(folder: str, owner: int) -> None:
    # A forked process inherits what is registered here.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class Metrics:
    """The samples of one worker. `publish` may be called from any thread. `engine` is its number among those of data
    parallelism, as in vLLM's own metrics."""

    def __init__(self, rank: int, engine: int = 0) -> None:
        self._folder = Path(os.environ.get(SHARED) or os.environ[OWN])
        self._worker = {"engine": str(engine), "rank": str(rank)}
        self._lock = threading.Lock()
        self._fates: WeakKeyDictionary[LoadRecord, tuple[int, dict[str, int]]] = WeakKeyDictionary()
        self._counted: WeakKeyDictionary[LoadRecord, dict[str, int]] = WeakKeyDictionary()
        self._totals: _Samples = {}
        self._published: tuple[_Samples, _Samples] | None = None
        self._failed = False

    def publish(self, records: Iterable[LoadRecord]) -> None:
        """Write the samples of these loads if any has changed. A failure is logged once, and the next call tries
        again."""
        with self._lock:
            gauges: _Samples = {}
            for record in records:
                for state, modules in self._states(record).items():
                    labels = {"generation": str(record.load.generation), "state": state}
                    gauges[MODULES, self._labels(record, labels)] = modules
                self._count(record)
            if self._published == (gauges, self._totals):
                return
            try:
                self._write("gauge_mostrecent", gauges)
                self._write("counter", self._totals)
            except OSError as error:
                if not self._failed:
                    logging.getLogger("vllm.lora_probe").error("lora-probe cannot publish its metrics: %s", error)
                self._failed = True
                return
            self._failed, self._published = False, (gauges, dict(self._totals))

    def _states(self, record: LoadRecord) -> dict[str, int]:
        """How many modules are in each state. Counted again only if the ledger has changed."""
        changes = record.changes
        known = self._fates.get(record)
        if known is None or known[0] != changes:
            ledger = record.ledger("vllm")
            known = self._fates[record] = changes, {state: ledger.count(fate) for fate, state in STATES.items()}
        return known[1]

    def _count(self, record: LoadRecord) -> None:
        """Add the rows since the last call. Counters of an adapter go on from load to load."""
        counted = self._counted.setdefault(record, {CONTAMINATED: 0, STALE: 0})
        for name, rows in ((CONTAMINATED, record.contaminated_rows), (STALE, record.stale_rows)):
            key = name, self._labels(record, {})
            self._totals[key] = self._totals.get(key, 0) + max(0, rows - counted[name])
            counted[name] = max(rows, counted[name])

    def _labels(self, record: LoadRecord, more: dict[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple({"adapter": record.load.name, **more, **self._worker}.items())

    def _write(self, kind: str, samples: _Samples) -> None:
        """Write all samples of a kind into a new file, and replace the old one by it."""
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        # The collector reads the names: the kind, the mode of a gauge, and whose file it is.
        path = self._folder / f"{kind}_lora-probe-{os.getpid()}.db"
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        values = MmapedDict(str(partial))
        try:
            for (name, labels), value in samples.items():
                sample = f"{name}_total" if kind == "counter" else name
                key = mmap_key(name, sample, [label for label, _ in labels], [text for _, text in labels], HELP[name])
                values.write_value(key, value, time.time())
        finally:
            values.close()
        partial.replace(path)
