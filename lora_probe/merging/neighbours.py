"""The other sites of an adapter that a site may have been mixed up with.

In: all sites of an adapter. Out: the module whose change or weight a site holds. A few rows of each site are kept, the
same rows for all sites of one shape, so that a thousand wrong modules cost no more than reading each site once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.base import Checkpoint
from lora_probe.files.values import widen
from lora_probe.ledger import Finding
from lora_probe.merging.change import Indices, change_of, origin_of
from lora_probe.merging.factor import cosine
from lora_probe.merging.rounding import Floats
from lora_probe.merging.scan import FEW, Measured, observed_change, thinned
from lora_probe.merging.sites import Site
from lora_probe.rules.lp7_merging import another_module, transposed_change

ALIKE = 0.7
"""Above this cosine a change is attributed to another module. Unrelated changes stay below 0.1 on a few thousand
values."""

Group = tuple[list[str], Floats, Floats]
"""The labels, and for each its change and its weight as one row, both of norm 1."""


class Neighbours:
    """Filled for all sites of a shape when the first of them is looked up."""

    def __init__(self, sites: Sequence[Site], base: Checkpoint, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self._sites: dict[tuple[str, int, int], list[Site]] = {}
        for site in sites:
            if site.pair is not None:
                self._sites.setdefault(self._kind(site), []).append(site)
        self._groups: dict[tuple[str, int, int], Group] = {}
        self._lock = threading.Lock()

    def _kind(self, site: Site) -> tuple[str, int, int]:
        height, width = self.base.tensors[site.tensor].matrix
        return site.kind, min(height, site.stop - site.start), width

    def owner(self, measured: Measured) -> Finding | None:
        """A finding if the site holds the change or weight of another module of the same shape, or its own change
        transposed."""
        few = thinned(measured, FEW)
        rows, change = few.sample.rows, few.change
        merged, observed = widen(few.sample.raw, measured.stored), observed_change(few)
        if change.shape[0] == change.shape[1]:
            turned = change.right[:, rows].T @ change.left.T
            if abs(cosine(observed, turned)) > ALIKE:
                return transposed_change()
        if measured.site.pair is None:
            return None
        labels, changes, weights = self._group(measured.site, rows)
        if (other := _most_alike(measured.site.label, labels, changes, observed)) is not None:
            return another_module("change", other)
        if cosine(merged, few.sample.w) > ALIKE:
            return None
        other = _most_alike(measured.site.label, labels, weights, merged)
        return another_module("weight", other) if other is not None else None

    def _group(self, site: Site, rows: Indices) -> Group:
        key = self._kind(site)
        with self._lock:
            if key not in self._groups:
                sites = self._sites[key]
                changes, weights = [], []
                for other in sites:
                    change, origin = change_of(other, self.adapter), origin_of(other, self.base)
                    changes.append(_unit(change.product(rows) * np.float32(np.sign(change.scaling))))
                    weights.append(_unit(np.concatenate([origin(int(row), int(row) + 1) for row in rows])))
                self._groups[key] = [other.label for other in sites], np.stack(changes), np.stack(weights)
            return self._groups[key]


def _unit(values: Floats) -> Floats:
    flat = values.reshape(-1)
    norm = np.linalg.norm(flat)
    scaled: Floats = flat / norm if norm > 0 else flat
    return scaled


def _most_alike(own: str, labels: list[str], rows: Floats, values: Floats) -> str | None:
    with np.errstate(invalid="ignore", over="ignore"):
        alike = rows @ _unit(values)
    best = max((number for number, label in enumerate(labels) if label != own), key=lambda n: alike[n], default=None)
    return labels[best] if best is not None and alike[best] > ALIKE else None
