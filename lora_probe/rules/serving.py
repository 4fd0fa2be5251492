"""LP4xx: the adapter against an engine's options and limits. Out: the refusal of a whole load."""

from __future__ import annotations

from lora_probe.rules import rule


@rule(
    "LP401",
    "refused-by-engine",
    "load",
    "absent",
    hint="the engine's own message says what it does not accept; a limit is an option of it (--max-lora-rank R)",
)
def refused(message: str) -> str:
    """The engine refused the adapter as a whole, and says why.

    Why it matters: nothing of the adapter is served. This is the good case: it is loud. Often the limit is an option
    of the engine (`--max-lora-rank`), sometimes a feature that it does not have (DoRA, modules_to_save).

    Example: `LoRA rank 64 is greater than max_lora_rank 16`: start the engine with `--max-lora-rank 64`.
    """
    return message
