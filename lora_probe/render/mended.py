"""What mending an adapter renames: as lines of a diff, as a sentence, as JSON.

In: a `Mending`. Out: text for a person, a dictionary for a program.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType

from lora_probe.mending import Mending
from lora_probe.render.cells import one_line, words


def diff(found: Mending) -> RenderableType:
    """Every name that changes, and those that cannot."""
    weights = found.adapter.weights.path
    parts: list[RenderableType] = [words(f"--- {weights}"), words("+++ adapter_model.safetensors")]
    for old, new in found.renamed.items():
        parts += [words(f"-{one_line(old)}", style="red"), words(f"+{one_line(new)}", style="green")]
    if not found.renamed:
        parts = [words("no name changes")]
    if found.converted:
        parts.append(words(f"{weights.name} becomes adapter_model.safetensors"))
    return Group(*parts, *(words(f"stays: {one_line(name)}: {why}") for name, why in found.left.items()))


def story(found: Mending, folder: str, skipped: list[str]) -> str:
    """What was done, in a few sentences."""
    if not found.needed:
        return "nothing to mend: every tensor has the name that engines look for; nothing was written"
    count = len(found.renamed)
    said = [f"wrote {folder}: {count} of {len(found.adapter.weights.tensors)} tensors renamed"]
    if count:
        old, new = next(iter(found.renamed.items()))
        said.append(f"`{one_line(old)}` is now `{one_line(new)}`" + (", and so on" if count > 1 else ""))
    if found.converted:
        said.append(f"{found.adapter.weights.path.name} became adapter_model.safetensors")
    if found.left:
        name, why = next(iter(found.left.items()))
        said.append(f"{len(found.left)} tensors keep their names (`{one_line(name)}`: {why})")
    if skipped:
        said.append(f"not copied: {', '.join(one_line(name) for name in skipped)}")
    return "; ".join(said)


def mending_json(found: Mending) -> dict[str, Any]:
    """What `--diff --format json` prints."""
    return {
        "schema_version": 1,
        "adapter": str(found.adapter.path),
        "renamed": dict(found.renamed),
        "left": dict(found.left),
        "converted": found.converted,
    }
