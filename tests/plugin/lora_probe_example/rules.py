"""Rules of the engine `example`, under the prefix EX. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Iterator

from lora_probe.names import in_words
from lora_probe.rules import AdapterFinding, rule, survey
from lora_probe.rules.subject import Subject

ADAPTED = ("q_proj", "k_proj", "v_proj")
"""The projections that the engine adapts."""
MULTIPLE = 8


@survey(
    "EX101",
    "rank-is-padded",
    severity="warning",
    engines=("example",),
    hint=f"train with a rank that is a multiple of {MULTIPLE}",
)
def rank_is_padded(subject: Subject) -> Iterator[AdapterFinding]:
    """The rank is not a multiple of 8, so the engine `example` pads the matrices.

    Why it matters: padded rows are multiplied as well, and cost time without effect.
    """
    rank = subject.adapter.config.rank
    if rank % MULTIPLE:
        yield AdapterFinding(f"r={rank} is not a multiple of {MULTIPLE}", field="r")


@rule(
    "EX201",
    "projection-not-adapted",
    "placed",
    "absent",
    engines=("example",),
    hint="merge the adapter, or serve it with another engine",
)
def not_adapted(projection: str) -> str | None:
    """The engine `example` does not adapt this projection.

    Why it matters: the pair is loaded and has no effect.
    """
    if projection in ADAPTED:
        return None
    return f"`{projection}` is not adapted: only {in_words(ADAPTED)} are"
