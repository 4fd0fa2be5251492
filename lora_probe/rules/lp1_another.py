"""LP1xx: whether the config belongs to the weights. In: a `Subject`. Out: an `AdapterFinding`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_probe.files import brief
from lora_probe.names import projection_of, ranges
from lora_probe.rules.lp1_targets import RESTORE
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, survey
from lora_probe.rules.stored import Expected, rows_of

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject


@survey(
    "LP113",
    "config-of-another-adapter",
    hint=f"{RESTORE}; do not correct single values: `lora_alpha` cannot be checked, and the scaling depends on it",
    explains=("LP106", "LP201", "LP204", "LP402", "LP410"),
)
def config_of_another(subject: Subject) -> Iterator[AdapterFinding]:
    """The config and the weights disagree in several facts: the config is probably that of another adapter.

    What it does: checks three facts: no pair has the rank of the config; a targeted projection has no pair; a
    projection of the file is not targeted. If two of them are true, they are reported together, instead of one by one.

    Why it matters: either side may be right, and a value that is corrected alone can make it worse, because
    `lora_alpha` is not visible in the weights. With the config `r: 16`, `lora_alpha: 32` beside weights of rank 8,
    writing 8 into `r` turns the scaling from 2 into 4.

    Example: two runs that wrote into one folder; an adapter_config.json copied from a similar adapter.

    Fix: restore the adapter_config.json that was saved with these weights, or the weights that belong to the config.
    """
    rows = rows_of(subject)
    facts = [fact for fact in (_ranks(rows), _lacking(rows), _extra(rows, subject)) if fact is not None]
    if len(facts) > 1:
        keys = tuple(dict.fromkeys(row.key for _, of_fact in facts for row in of_fact))
        field = "target_modules" if _ranks(rows) is None else "r"
        what = "; ".join(text for text, _ in facts)
        yield AdapterFinding(f"the config is probably that of another adapter: {what}", keys=keys, field=field)


FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
"""Fields of which both engines ask only whether they are true, and that change what the adapter computes."""


@survey(
    "LP114",
    "flag-that-is-text",
    hint="write true or false without quotes: the value of the training",
)
def flag_that_is_text(subject: Subject) -> Iterator[AdapterFinding]:
    """A flag of the config is a text, not true or false.

    Why it matters: PEFT 0.21 and vLLM ({vllm}) take every text that is not empty for true, also "false". With
    `"use_rslora": "false"`, rank 4 and alpha 8, both scale by 4 instead of 2, and report nothing.
    """
    for field in FLAGS:
        value = subject.adapter.config.raw.get(field)
        if isinstance(value, str) and value:
            yield AdapterFinding(f"`{field}` is the text {brief(value)}, which counts as true", field=field)


Fact = tuple[str, list[Expected]]
"""What disagrees, and the modules that it is about."""


def _ranks(rows: Sequence[Expected]) -> Fact | None:
    """That no pair has the rank that the config sets for it."""
    plain = [row for row in rows if row.entry is not None and row.entry.matrices and row.entry.parameter == "weight"]
    ranks = {(row.entry.config_rank, row.entry.rank or 0) for row in plain if row.entry is not None}
    if not ranks or any(wanted == held for wanted, held in ranks):
        return None
    wanted, held = (ranges(list(side)) for side in zip(*ranks, strict=True))
    return f"rank {wanted} in the config, {held} in the file", plain


def _lacking(rows: Sequence[Expected]) -> Fact | None:
    """Projections that are targeted, and that have no pair in any layer."""
    held = {projection_of(row.module) for row in rows if row.entry is not None}
    lacking = [row for row in rows if row.entry is None and projection_of(row.module) not in held]
    return (f"{_projections(lacking)} targeted, but not in the file", lacking) if held and lacking else None


def _extra(rows: Sequence[Expected], subject: Subject) -> Fact | None:
    """Projections that have pairs, and that are not targeted in any layer."""
    targeted = {projection_of(row.module) for row in rows if "config" in row.expected_by}
    extra = [
        row
        for row in rows
        if projection_of(row.module) not in targeted
        and row.entry is not None
        and row.entry.parameter == "weight"
        and (subject.shapes is None or row.module in subject.shapes)
    ]
    if not extra or "target_modules" not in subject.adapter.config.raw:
        return None
    return f"{_projections(extra)} in the file, but not targeted", extra


def _projections(rows: Sequence[Expected]) -> str:
    return listed(list(dict.fromkeys(projection_of(row.module) for row in rows)))
