"""`inspect --module` as text: one module with its values.

In: a `OneModule` module. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType

from lora_probe.adapter.one_module import OneModule, TensorValues, label
from lora_probe.files.weights import TensorHeader
from lora_probe.render.cells import words
from lora_probe.render.tables import Facts, Fitted, add_row, columns_of
from lora_probe.render.verdicts import of_module

_PER_LINE = 8
"""Singular values in a line."""


def module(selected: OneModule) -> RenderableType:
    """Names, shapes, scaling, all singular values, and a corner of every tensor."""
    return Group(
        of_module(selected).line,
        words(""),
        tensors(selected),
        *_missing(selected),
        *_singular(selected),
        *(part for values in selected.tensors for part in _corner(values)),
        words(""),
        Facts(*facts_of(selected)),
    )


def facts_of(selected: OneModule) -> tuple[tuple[str, str], ...]:
    """The module with its rank and scaling."""
    pair, config = selected.module, selected.adapter.config
    rank = str(pair.rank)
    if pair.rank != pair.config_rank:
        rank = f"{pair.rank} in the tensors, {pair.config_rank} in the config"
    formula = "alpha / sqrt(r)" if config.rslora else "alpha / r"
    return (
        ("adapter", str(selected.adapter.path)),
        ("module", label(pair)),
        ("rank", rank),
        ("scaling", f"{pair.scaling:g} ({formula}, from the config)"),
        ("‖ΔW‖", _effect(selected)),
    )


def tensors(selected: OneModule) -> Fitted:
    """Each tensor of the module with its norm."""
    table = columns_of("tensor", "shape", "dtype", "norm")
    for values in selected.tensors:
        add_row(table, values.tensor.name, _shape(values.tensor), values.tensor.dtype, _norm(values))
    return table


def _effect(selected: OneModule) -> str:
    spectrum = selected.spectrum
    if spectrum is None:
        return "none: A and B do not form a pair"
    if not spectrum.finite:
        return "not finite: A or B contains NaN or infinity"
    return f"{spectrum.norm:.6g}, effective rank {spectrum.effective_rank:.2f} of {selected.module.rank}"


def _shape(tensor: TensorHeader) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _norm(values: TensorValues) -> str:
    return "not read" if values.norm is None else f"{values.norm:.6g}"


def _missing(selected: OneModule) -> Iterable[RenderableType]:
    for half, tensor in (("lora_A", selected.module.a), ("lora_B", selected.module.b)):
        if tensor is None:
            yield words(f"{half} is not in the file", style="bold yellow")


def _singular(selected: OneModule) -> Iterable[RenderableType]:
    if selected.spectrum is None or not selected.spectrum.finite:
        return
    values = [f"{value:.4g}" for value in selected.spectrum.singular]
    yield words("")
    yield words(f"all {len(values)} singular values of s·B·A", style="bold")
    for at in range(0, len(values), _PER_LINE):
        yield words("  " + "  ".join(f"{value:>10}" for value in values[at : at + _PER_LINE]))


def _corner(values: TensorValues) -> Iterable[RenderableType]:
    name = values.tensor.name
    yield words("")
    if values.corner is None:
        yield words(f"{name} is not shown: {values.why}", style="bold yellow")
        return
    rows, columns = values.corner.shape
    whole = values.tensor.parameters == values.corner.size
    yield words(f"{name}{'' if whole else f', its first {rows} × {columns} values'}", style="bold")
    for row in values.corner:
        yield words("  " + "  ".join(f"{value:>12.5g}" for value in row))
