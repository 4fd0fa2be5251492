"""JSON of `inspect A B`: two adapters side by side.

In: an `AdapterDiff`. Out: a plain dictionary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_probe.adapter.diff_verdict import verdict
from lora_probe.adapter.side_by_side import AdapterDiff, ModulePair
from lora_probe.names import Key, path_of
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION


def side_by_side_json(diff: AdapterDiff) -> dict[str, Any]:
    """The verdict, the fields that differ, and the relation of every module. Angles are in degrees."""
    return {
        "schema_version": SCHEMA_VERSION,
        "same": diff.same,
        "verdict": verdict(diff),
        "first": str(diff.first.path),
        "second": str(diff.second.path),
        "fields": [{"field": name, "first": one, "second": two} for name, one, two in diff.fields],
        "modules": [_module(pair) for pair in diff.modules],
        "only_in_first": [path_of(key) for key in diff.unshared[0]],
        "only_in_second": [path_of(key) for key in diff.unshared[1]],
        "other_tensors": list(diff.other_tensors),
    }


def _module(pair: ModulePair) -> dict[str, Any]:
    return {
        "module": pair.key[0],
        "parameter": pair.key[1],
        "expert": pair.key[2],
        "kind": pair.kind,
        "source": _path(pair.source),
        "why": pair.why or None,
        "ranks": [pair.first.rank, pair.second.rank],
        "scalings": [pair.first.scaling, pair.second.scaling],
        "share": finite(pair.share),
        **_relation(pair),
    }


def _relation(pair: ModulePair) -> dict[str, Any]:
    names = ("norms", "cosine", "factor", "distance", "shared_rows", "shared_columns", "row_angles", "column_angles")
    relation = pair.relation
    if relation is None or not relation.finite:
        # Equal values that are no numbers are equal all the same.
        return dict.fromkeys(names) | {"cosine": pair.cosine, "distance": finite(pair.distance)}
    numbers = (pair.cosine, relation.factor, pair.distance, relation.shared_rows, relation.shared_columns)
    angles = (np.degrees(np.arccos(cosines)).round(4).tolist() for cosines in (relation.rows, relation.columns))
    return dict(zip(names, (list(relation.norms), *map(finite, numbers), *angles), strict=True))


def _path(key: Key | None) -> str | None:
    return None if key is None else path_of(key)
