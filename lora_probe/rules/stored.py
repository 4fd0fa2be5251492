"""What a ledger expects before any engine runs: its rows, with `stored` already judged.

In: an adapter, and the base's module shapes if they are known. Out: one `Expected` for each module that the
config targets on this base or the file holds. A name in the file that is not a module of the base shares the row of the
only base module that ends in the same path from the layer number on, if that module has no pair of its own, or of the
targeted module that it becomes by renaming words (`renamed.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pattern_index import ends as path_ends
from lora_probe.adapter.spectrum import Spectrum, pair_spectrum
from lora_probe.base import Shapes
from lora_probe.ledger import OK, Finding, worse
from lora_probe.names import LAYER, Key, natural
from lora_probe.rules.lp2_weights import (
    half_missing,
    not_a_matrix,
    not_finite,
    not_in_file,
    rank_differs,
    variant_missing,
    zero_delta,
)
from lora_probe.rules.lp3_shapes import shape_differs
from lora_probe.rules.paths import bare
from lora_probe.rules.renamed import renamed_homes

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

MOST_CANDIDATES = 100
"""The most modules of a base that one name may mean. Real models have fewer towers; with more, none is chosen."""


@dataclass(frozen=True)
class Expected:
    """One row of a future ledger. `entry` is the pair in the file, `homeless`: its name is not a module of the base."""

    key: Key
    entry: AdapterModule | None
    homeless: bool
    expected_by: tuple[str, ...]
    stored: Finding
    spectrum: Spectrum | None

    @property
    def module(self) -> str:
        return self.key[0]


def expect(
    adapter: Adapter,
    shapes: Shapes | None,
    aliases: Mapping[str, str] | None = None,
    spectra: Mapping[Key, Spectrum | None] | None = None,
) -> tuple[Expected, ...]:
    """The rows of the ledger for `adapter` on a base with `shapes` (None: the base is unknown).

    `aliases` maps a module's name in the file to its name in `shapes`, if an engine treats both as the same module.
    `spectra` are those of the adapter's pairs, if they have been computed already.
    """
    entries = adapter.by_key()
    modules = shapes or {}
    targeted = set(adapter.config.targeted(modules))
    same = {key: (aliases or {}).get(key[0], key[0]) for key in entries if key[0] not in modules}
    same = {key: home for key, home in same.items() if home in modules}
    homes = _homes(entries, modules, set(same.values())) | same
    lost = {k: e for k, e in entries.items() if k[0] not in modules and k not in homes and e.parameter == "weight"}
    vacant = modules.keys() - {homes.get(key, key[0]) for key in entries}
    homes |= renamed_homes(lost, vacant, modules, adapter.config.targets.is_named)
    transposed = bool(adapter.config.raw.get("fan_in_fan_out"))
    rows: dict[Key, Expected] = {}
    for key, entry in entries.items():
        home = homes.get(key, key[0])
        wanted = home in targeted if modules else adapter.config.targets.module(home)
        plain = entry.parameter == "weight"
        spectrum = pair_spectrum(adapter, entry) if spectra is None else spectra[key]
        stored = judge_stored(adapter, entry, spectrum, modules.get(home) if plain else None, transposed)
        by = ("config", "file") if wanted else ("file",)
        homeless = bool(modules) and plain and key[0] not in modules and key not in same
        rows[(home, *key[1:])] = Expected((home, *key[1:]), entry, homeless, by, stored, spectrum)
    filled = {home for home, _, _ in rows}
    for module in targeted - filled:
        key = (module, "weight", None)
        rows[key] = Expected(key, None, False, ("config",), not_in_file(adapter.source), None)
    return tuple(rows[key] for key in sorted(rows, key=lambda k: (natural(k[0]), k[1], k[2] or 0)))


def rows_of(subject: Subject) -> tuple[Expected, ...]:
    """The rows for the adapter of a subject, by the names of its base model, without spectra."""
    return expect(subject.adapter, subject.shapes, spectra={pair.key: None for pair in subject.adapter.modules})


def judge_stored(
    adapter: Adapter,
    pair: AdapterModule,
    spectrum: Spectrum | None,
    shape: tuple[int, int] | None,
    transposed: bool = False,
) -> Finding:
    """Run the LP2xx and LP3xx rules over one pair; the worst finding, the first of equally bad ones."""
    findings = [not_a_matrix(pair), half_missing(pair)]
    if not any(findings):
        findings += [rank_differs(pair, adapter.config), variant_missing(pair, adapter.config)]
        if shape is not None:
            findings.append(shape_differs(pair, shape, transposed))
    if spectrum is not None:
        findings += [not_finite(spectrum), zero_delta(pair, spectrum, adapter.config)]
    worst = OK
    for finding in findings:
        if finding is not None:
            worst = worse(worst, finding)
    return worst


def _homes(entries: Mapping[Key, AdapterModule], shapes: Shapes, taken: set[str]) -> dict[Key, str]:
    """For each key whose module the base does not have, the base module that it must have meant, if that is not
    `taken`.

    Several towers of one base may have a layer of that number. One tower is chosen for all keys with the same start:
    the one with modules of the right shape for most of them.
    """
    strange = {key: entry for key, entry in entries.items() if key[0] not in shapes}
    if not shapes or not strange:
        return {}
    ends: dict[str, list[str]] = {}
    # A whole path says more than what is left of it from the layer on: `encoder.layers.0.q` is not of the decoder.
    longer: dict[str, list[str]] = {}
    for name in shapes:
        ends.setdefault(_from_layer_on(name), []).append(name)
        for end in filter(LAYER.search, path_ends(name)):
            longer.setdefault(end, []).append(name)
    own = {key[0] for key in entries} | taken
    candidates: dict[Key, list[str]] = {}
    votes: dict[str, Counter[str]] = {}
    for key, entry in strange.items():
        plain = bare(key[0])
        same = longer.get(plain) or next(([end] for end in path_ends(plain) if end in shapes), [])
        same = same if len(same) == 1 else ends.get(_from_layer_on(plain), [])
        candidates[key] = [name for name in same if name not in own] if len(same) <= MOST_CANDIDATES else []
        for name in candidates[key]:
            votes.setdefault(_beginning(key[0]), Counter())[_beginning(name)] += 1 + 10_000 * _fits(entry, shapes[name])
    elected = {beginning: counted.most_common(2) for beginning, counted in votes.items()}
    homes: dict[Key, str] = {}
    claims: Counter[str] = Counter()
    for key, names in candidates.items():
        first, *rest = elected[_beginning(key[0])] if names else [("", 0)]
        meant = [name for name in names if _beginning(name) == first[0]]
        if len(meant) == 1 and not (rest and rest[0][1] == first[1]):
            homes[key] = meant[0]
            claims[meant[0]] += 1
    return {key: home for key, home in homes.items() if claims[home] == 1}


def _beginning(module: str) -> str:
    """The part before the layer's number; outside of layers the parent."""
    match = LAYER.search(module)
    return module[: match.start(1)] if match else module.rpartition(".")[0]


def _fits(entry: AdapterModule, shape: tuple[int, int] | None) -> bool:
    return shape is not None and shape_differs(entry, shape, transposed=False) is None


def _from_layer_on(module: str) -> str:
    """What identifies a module regardless of the part before the layers; outside of layers its last word."""
    match = LAYER.search(module)
    return module[match.start(1) :] if match else module.rpartition(".")[2]
