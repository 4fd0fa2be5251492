"""`check --diff` and `check --fix` as text: the tensors that are renamed.

In: a `Fix` or a `FixResult`. Out: lines of a diff, and a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from rich.console import Group, RenderableType

from lora_probe.checking.renaming import Fix
from lora_probe.render.cells import words
from lora_probe.render.results import FixResult


def diff(fix: Fix) -> RenderableType:
    """Each kind of change with an example, then every name that changes, and those that cannot."""
    weights = fix.adapter.weights.path
    parts: list[RenderableType] = [*_kinds(fix)]
    parts += [words(f"--- {weights}"), words("+++ adapter_model.safetensors")]
    for old, new in fix.renamed.items():
        parts += _pair(old, new)
    if not fix.renamed:
        parts = [words("nothing to fix: no tensor has a name that --fix can correct")]
    if fix.converted:
        parts.append(words(f"{weights.name} is converted to adapter_model.safetensors"))
    return Group(*parts, *(words(f"not renamed: {name}: {why}") for name, why in fix.left.items()))


def _kinds(fix: Fix) -> Iterable[RenderableType]:
    kinds: dict[str, list[str]] = {}
    for old, new in fix.renamed.items():
        kinds.setdefault(change(old, new), []).append(old)
    for kind, names in kinds.items():
        yield words(f"{len(names)} {'key' if len(names) == 1 else 'keys'}: {kind}", style="bold")
        yield from _pair(names[0], fix.renamed[names[0]], "  ")
        yield words("")


def _pair(old: str, new: str, indent: str = "") -> tuple[RenderableType, RenderableType]:
    return words(f"{indent}-{old}", style="red"), words(f"{indent}+{new}", style="green")


def change(old: str, new: str) -> str:
    """The difference between two names, part by part: `_orig_mod. removed`."""
    was, now = ([f"{part}." for part in name.split(".")] for name in (old, new))
    changes: dict[str, None] = {}
    for what, i, j, k, n in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        before, after = "".join(was[i:j]), "".join(now[k:n])
        if what == "replace":
            changes[f"{before} became {after}"] = None
        elif what != "equal":
            changes[f"{before} removed" if before else f"{after} added"] = None
    return ", ".join(changes)


def summary(result: FixResult) -> str:
    """What was done, in one line."""
    fix = result.fix
    if not fix.needed:
        return "nothing to fix: no tensor has a name that --fix can correct; nothing was written"
    count = len(fix.renamed)
    parts = [f"wrote {result.folder}: {count} of {len(fix.adapter.weights.tensors)} tensors renamed"]
    if count:
        old, new = next(iter(fix.renamed.items()))
        parts.append(f"`{old}` is now `{new}`" + (", and so on" if count > 1 else ""))
    if fix.converted:
        parts.append(f"{fix.adapter.weights.path.name} was converted to adapter_model.safetensors")
    if fix.left:
        name, why = next(iter(fix.left.items()))
        parts.append(f"{len(fix.left)} tensors were not renamed (`{name}`: {why})")
    if result.not_copied:
        parts.append(f"not copied: {', '.join(result.not_copied)}")
    return "; ".join(parts)
