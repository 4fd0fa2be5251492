"""The other sites of an adapter that one may have been mixed up with.

In: all sites of an adapter. Out: whose change, or whose weight, some values of a site are. Of each site a few rows are
kept, the same for all of one shape, so that a thousand wrong modules cost no more than reading each once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.base import Checkpoint
from lora_probe.files.weights import widen
from lora_probe.ledger import Finding
from lora_probe.merging.change import Indices, change_of, origin_of
from lora_probe.merging.factor import cosine
from lora_probe.merging.rounding import Floats
from lora_probe.merging.scan import FEW, Measured, observed_change, thinned
from lora_probe.merging.sites import Site
from lora_probe.rules.lp7_merging import another_module, transposed_change

ALIKE = 0.7
"""Cosine from which a change is called another module's: unrelated changes stay below 0.1 on a few thousand values."""

Group = tuple[list[str], Floats, Floats]
"""Labels, and one row for each: its change, and its weight, both of norm 1."""


class Neighbours:
    """Filled when the first site of a shape asks, for all sites of that shape."""

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

    def owner(self, found: Measured) -> Finding | None:
        """Whose change or whose weight it is, if it is another module's of the same shape, or its own transposed."""
        few = thinned(found, FEW)
        rows, change = few.sample.rows, few.change
        merged, observed = widen(few.sample.raw, found.stored), observed_change(few)
        if change.shape[0] == change.shape[1]:
            turned = change.right[:, rows].T @ change.left.T
            if abs(cosine(observed, turned)) > ALIKE:
                return transposed_change()
        if found.site.pair is None:
            return None
        labels, changes, weights = self._group(found.site, rows)
        if (other := _most_alike(found.site.label, labels, changes, observed)) is not None:
            return another_module("change", other)
        if cosine(merged, few.sample.w) > ALIKE:
            return None
        other = _most_alike(found.site.label, labels, weights, merged)
        return another_module("weight", other) if other is not None else None

    def _group(self, site: Site, rows: Indices) -> Group:
        key = self._kind(site)
        with self._lock:
            if key not in self._groups:
                sites = self._sites[key]
                changes, weights = [], []
                for one in sites:
                    change, origin = change_of(one, self.adapter), origin_of(one, self.base)
                    changes.append(_unit(change.product(rows) * np.float32(np.sign(change.scaling))))
                    weights.append(_unit(np.concatenate([origin(int(row), int(row) + 1) for row in rows])))
                self._groups[key] = [one.label for one in sites], np.stack(changes), np.stack(weights)
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
