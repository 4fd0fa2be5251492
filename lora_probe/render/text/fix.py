"""What mending an adapter renames: as lines of a diff, as a sentence, as JSON.

In: a `Fix`. Out: text for a person, a dictionary for a program.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from rich.console import Group, RenderableType

from lora_probe.checking.renaming import Fix
from lora_probe.render.cells import words


def diff(found: Fix) -> RenderableType:
    """Each kind of change with an example, then every name that changes, and those that cannot."""
    weights = found.adapter.weights.path
    parts: list[RenderableType] = [*_summary(found)]
    parts += [words(f"--- {weights}"), words("+++ adapter_model.safetensors")]
    for old, new in found.renamed.items():
        parts += _pair(old, new)
    if not found.renamed:
        parts = [words("no name changes")]
    if found.converted:
        parts.append(words(f"{weights.name} becomes adapter_model.safetensors"))
    return Group(*parts, *(words(f"stays: {name}: {why}") for name, why in found.left.items()))


def _summary(found: Fix) -> Iterable[RenderableType]:
    kinds: dict[str, list[str]] = {}
    for old, new in found.renamed.items():
        kinds.setdefault(change(old, new), []).append(old)
    for kind, names in kinds.items():
        yield words(f"{len(names)} {'key' if len(names) == 1 else 'keys'}: {kind}", style="bold")
        yield from _pair(names[0], found.renamed[names[0]], "  ")
        yield words("")


def _pair(old: str, new: str, indent: str = "") -> tuple[RenderableType, RenderableType]:
    return words(f"{indent}-{old}", style="red"), words(f"{indent}+{new}", style="green")


def change(old: str, new: str) -> str:
    """What makes one name of another, part by part: `_orig_mod. removed`."""
    was, now = ([f"{part}." for part in name.split(".")] for name in (old, new))
    changes: dict[str, None] = {}
    for what, i, j, k, n in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        before, after = "".join(was[i:j]), "".join(now[k:n])
        if what == "replace":
            changes[f"{before} became {after}"] = None
        elif what != "equal":
            changes[f"{before} removed" if before else f"{after} added"] = None
    return ", ".join(changes)


def story(found: Fix, folder: str, skipped: list[str]) -> str:
    """What was done, in a few sentences."""
    if not found.needed:
        return "nothing to mend: every tensor has the name that engines look for; nothing was written"
    count = len(found.renamed)
    said = [f"wrote {folder}: {count} of {len(found.adapter.weights.tensors)} tensors renamed"]
    if count:
        old, new = next(iter(found.renamed.items()))
        said.append(f"`{old}` is now `{new}`" + (", and so on" if count > 1 else ""))
    if found.converted:
        said.append(f"{found.adapter.weights.path.name} became adapter_model.safetensors")
    if found.left:
        name, why = next(iter(found.left.items()))
        said.append(f"{len(found.left)} tensors keep their names (`{name}`: {why})")
    if skipped:
        said.append(f"not copied: {', '.join(skipped)}")
    return "; ".join(said)


def mending_json(found: Fix) -> dict[str, Any]:
    """What `--diff --format json` prints."""
    return {
        "schema_version": 1,
        "adapter": str(found.adapter.path),
        "renamed": dict(found.renamed),
        "left": dict(found.left),
        "converted": found.converted,
    }


def mended_json(found: Fix, folder: str, skipped: list[str]) -> dict[str, Any]:
    """What was done, as a member of the report of `--fix --format json`; `folder` is null where nothing was written."""
    return {
        "folder": folder if found.needed else None,
        "renamed": dict(found.renamed),
        "left": dict(found.left),
        "converted": found.converted,
        "not_copied": list(skipped),
    }
