"""What the engine `example` will do with an adapter, predicted from files.

In: a `Subject` and a row of its ledger. Out: `read` and `placed` of the row, or why the engine refuses the adapter.
"""

from __future__ import annotations

from lora_probe.adapter import AdapterModule
from lora_probe.ledger import OK, Finding
from lora_probe.names import projection_of
from lora_probe.prediction.predictor import Predictor, Refusal, expected_shape, no_module, not_known
from lora_probe.rules.stored import Expected
from lora_probe.rules.subject import Place, Subject
from lora_probe_example.rules import not_adapted

NAME = "example"


def misfit(pair: AdapterModule, shape: tuple[int, int]) -> str:
    """Why a pair cannot be multiplied with the rows of a layer of this shape (out, in); empty where it can."""
    out, into = shape
    if pair.a is None or pair.b is None:
        return f"`{pair.stored_as}` has only one half"
    if (pair.b.shape[:1], pair.a.shape[1:]) != ((out,), (into,)):
        return f"`{pair.stored_as}` does not fit a layer of shape [{out}, {into}]"
    return ""


def _judge(subject: Subject, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    if place is not None and place.module is None:
        return no_module(row, subject.views[NAME]), Finding("absent")
    return OK, not_adapted(projection_of(row.module)) or (OK if place is not None else not_known(subject))


def _refuse(subject: Subject, row: Expected, place: Place | None) -> Refusal | None:
    assert row.entry is not None
    shape = expected_shape(place, embedding=False) if place is not None else None
    if shape is None or not_adapted(projection_of(row.module)) is not None:
        return None
    message = misfit(row.entry, shape)
    return (row.stored.code or "LP301", message) if message else None


PREDICTOR = Predictor(NAME, "Example", _judge, _refuse, install="pip install lora-probe-example", has_flags=False)
