"""JSON of `check --diff` and `check --fix`: the tensors that are renamed.

In: a `Fix` or a `FixResult`. Out: a plain dictionary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_probe.render.json import SCHEMA_VERSION

if TYPE_CHECKING:
    from lora_probe.checking.renaming import Fix
    from lora_probe.render.results import FixResult


def diff_json(fix: Fix) -> dict[str, Any]:
    """The output of `check --diff`."""
    return {"schema_version": SCHEMA_VERSION, "adapter": str(fix.adapter.path), **_names(fix)}


def fix_json(result: FixResult) -> dict[str, Any]:
    """What `check --fix` did, for its report. `folder` is null if nothing was written."""
    return {
        "folder": result.folder if result.fix.needed else None,
        **_names(result.fix),
        "not_copied": list(result.not_copied),
    }


def _names(fix: Fix) -> dict[str, Any]:
    return {"renamed": dict(fix.renamed), "left": dict(fix.left), "converted": fix.converted}
