"""LP3xx: pairs of fused experts, which PEFT 0.19 turned round. In: a `Subject` with PEFT's view. Out:
`AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.names import Universe, name_modules, path_of
from lora_probe.rules.registry import AdapterFinding, survey

if TYPE_CHECKING:
    from lora_probe.adapter import AdapterModule
    from lora_probe.names import Key
    from lora_probe.rules.subject import Subject

TURNED = 0, 19
"""The version of PEFT that reads an expert's parameter as (out, in); before, it was (in, out)."""


@survey(
    "LP327",
    "experts-turned-round",
    engines=("peft",),
    needs="peft",
    hint="train the adapter again with this PEFT, or merge it with the PEFT that wrote it",
)
def experts_turned_round(subject: Subject) -> Iterator[AdapterFinding]:
    """A pair of fused experts has A and B of the other layout of PEFT, before or after 0.19.

    What it does: compares the inputs of A and the outputs of B with the experts' parameter, as PEFT reads it since 0.19
    and as it read it before. If both fit, because the parameter is square, `peft_version` in the config decides.

    Why it matters: up to 0.18, PEFT took the first axis of an expert's matrix for its inputs, although most models
    store (out, in). PEFT refuses an adapter of the other layout (`size mismatch`), except on a square matrix: there it
    multiplies with the transposed change, without a word.

    Fix: there is no option for the old layout: train again, or merge with the PEFT that wrote the file.

    References: huggingface/peft#3165.
    """
    view = subject.views["peft"]
    reads_new = _is_new(view.version) is not False
    written = subject.adapter.config.peft_version
    refused: list[Key] = []
    silent: list[Key] = []
    for pair in subject.adapter.modules:
        place = subject.places["peft"].get(pair.key)
        shape = view.expert_shapes.get(f"{place.name}.{pair.parameter}") if place is not None else None
        if shape is None or (fits := _fits(pair, shape)) is None:
            continue
        if fits == {not reads_new}:
            refused.append(pair.key)
        elif len(fits) == 2 and (new := _is_new(written or "")) is not None and new != reads_new:
            silent.append(pair.key)
    universe = Universe(tuple(path_of(pair.key) for pair in subject.adapter.modules))
    layouts = ("0.18 and older", "0.19 and newer")
    here, there = layouts[reads_new], layouts[not reads_new]
    by = f"written by PEFT {written}" if written else "of an unknown version"
    if refused:
        names = name_modules(map(path_of, refused), universe)
        text = f"{names}: A and B have the layout of PEFT {there} ({by}), and this PEFT has that of {here}"
        yield AdapterFinding(text, refuses=True)
    elif silent:
        names = name_modules(map(path_of, silent), universe)
        text = f"{names}: A and B fit the layouts of PEFT {there} and of {here}, and the file was {by}"
        yield AdapterFinding(text, keys=tuple(silent), station="placed", value="wrong")


def _fits(pair: AdapterModule, shape: tuple[int, int]) -> set[bool] | None:
    """In which layouts a pair fits an expert's (out, in): True is that of PEFT 0.19 and newer. None for half a pair,
    and if it fits in neither."""
    if pair.a is None or pair.b is None or len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return None
    actual = pair.b.shape[0], pair.a.shape[1]
    return {new for new, expected in ((True, shape), (False, shape[::-1])) if actual == expected} or None


def _is_new(version: str) -> bool | None:
    """Whether a version of PEFT has the new layout; None if it is not known."""
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) >= TURNED if len(numbers) == 2 and all(map(str.isdigit, numbers)) else None
