"""The requests of a trace across its files: their ids, and what went wrong for them.

In: the ids of rows and those of the answers in the same trace; findings of several ranks. Out: rows with the client's
ids, where these are certain; one finding for each load and rule.

vLLM appends `-` and eight hexadecimal digits to the id of a client, because clients may use an id twice. Rows on disk
have vLLM's own ids, so that two requests with one id remain two; answers have the client's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from lora_probe.recording.records import RequestFinding
from lora_probe.recording.rows import Rows

_DIGITS = frozenset("0123456789abcdef")


def client_id(engine_id: str) -> str:
    """The client's id in an id of vLLM; other ids are returned as they are."""
    head, _, tail = engine_id.rpartition("-")
    return head if head and len(tail) == 8 and set(tail) <= _DIGITS else engine_id


def client_ids(engine_ids: Sequence[str], answers: Collection[str]) -> tuple[str, ...]:
    """The ids of `engine_ids` by which the client knows them, in the same order.

    An id is only replaced by one of `answers`, and only if no other request has the same client's id: otherwise the
    rows of two requests would be taken for those of one.
    """
    names = [engine_id if engine_id in answers else client_id(engine_id) for engine_id in engine_ids]
    uses = Counter(names)
    return tuple(
        name if name in answers and uses[name] == 1 else engine_id
        for engine_id, name in zip(engine_ids, names, strict=True)
    )


def with_client_ids(rows: Rows, answers: Collection[str]) -> Rows:
    """The same rows under the client's ids, as in `client_ids`."""
    names = client_ids(rows.requests, answers)
    new = dict(zip(rows.requests, names, strict=True))
    return replace(rows, requests=names, served={new[old]: facts for old, facts in rows.served.items()})


def joined_findings(ranks: Iterable[Iterable[RequestFinding]]) -> tuple[RequestFinding, ...]:
    """One finding for each load and rule: the last of a rank, and the one with most rows of all ranks, as every rank
    runs the same requests."""
    findings: dict[tuple[int, str], RequestFinding] = {}
    for rank in ranks:
        last = {(finding.load, finding.code): finding for finding in rank}
        for of_rule, finding in last.items():
            if of_rule not in findings or finding.rows > findings[of_rule].rows:
                findings[of_rule] = finding
    return tuple(finding for _, finding in sorted(findings.items()))
