"""Fused expert parameters that an adapter targets (`target_parameters`), and where the base's files store them.

In: a pair of PEFT's ParamWrapper: A is (experts·r, in), B is (out, r·experts) with the expert running fastest. Out: a
`Site` for each expert, or for each of its parts if transformers' files store them one by one.
"""

from __future__ import annotations

import re

from lora_probe.adapter import AdapterModule
from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.merging.names import Names
from lora_probe.merging.sites import Placed, Site, SiteKind, Unplaced
from lora_probe.names import layer_of

_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
"""Model types that store fused experts as (experts, in, out); PEFT reads the live module's `is_transposed`."""
_APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""transformers' names for the parts of fused experts that are stored one by one."""
_EXPERT = re.compile(r"^.*\bexperts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight$")


def of_experts(module: AdapterModule, base: Checkpoint, names: Names) -> Placed:
    """The sites of one fused parameter."""
    fused = names.find(f"{module.module}.{module.parameter}")
    if fused is not None:
        yield from _fused(module, base.tensors[fused], str(base.config.get("model_type")))
    else:
        yield from _apart(module, base)


def _fused(module: AdapterModule, tensor: StoredTensor, model_type: str) -> Placed:
    assert module.a is not None
    assert module.b is not None
    shape = module.b.shape[0], module.a.shape[1]
    if len(tensor.shape) == 2 and tensor.shape == shape:
        yield Site(module.key, tensor.name, "expert", 0, shape[0], module.scaling, module)
        return
    count = tensor.shape[0] if len(tensor.shape) == 3 else 0
    if not count or tensor.shape[1:] not in (shape, shape[::-1]) or module.a.shape[0] % count:
        yield _unfit(module, f"{tensor.name} {list(tensor.shape)}")
        return
    square = shape[0] == shape[1]
    transposed = model_type in _TRANSPOSED if square else tensor.shape[1:] != shape
    kind: SiteKind = "transposed expert" if transposed else "expert"
    height = tensor.shape[1]
    for expert in range(count):
        key = (module.module, module.parameter, expert)
        rows = expert * height, (expert + 1) * height
        yield Site(key, tensor.name, kind, *rows, module.scaling, module, experts=count)


def _apart(module: AdapterModule, base: Checkpoint) -> Placed:
    assert module.a is not None
    assert module.b is not None
    parts = _parts(module, base)
    if not parts:
        yield Unplaced(_label(module), "the base has no such parameter, neither fused nor for each expert")
        return
    count = 1 + max(expert for expert, _ in parts)
    heights = {number: base.tensors[name].shape[0] for (_, number), name in parts.items()}
    if module.a.shape[0] % count or sum(heights.values()) != module.b.shape[0] or len(parts) != count * len(heights):
        yield _unfit(module, f"files have {count} experts of {sum(heights.values())} rows")
        return
    for (expert, number), name in parts.items():
        start = sum(height for other, height in heights.items() if other < number)
        yield Site(
            key=(module.module, module.parameter, expert),
            tensor=name,
            kind="expert",
            start=0,
            stop=heights[number],
            scaling=module.scaling,
            pair=module,
            part=name.split(".")[-2] if len(heights) > 1 else None,
            cut=(start, start + heights[number]),
            experts=count,
        )


def _parts(module: AdapterModule, base: Checkpoint) -> dict[tuple[int, int], str]:
    """(expert, number of the part) -> tensor, for experts that are stored one by one."""
    layer = layer_of(module.module)
    for words in _APART.get(module.parameter, ()):
        tensors = {}
        for name in base.tensors:
            match = _EXPERT.match(name)
            if match and match["part"] in words and layer_of(name) == layer:
                tensors[int(match["expert"]), words.index(match["part"])] = name
        if tensors:
            return dict(sorted(tensors.items()))
    return {}


def _unfit(module: AdapterModule, stored: str) -> Unplaced:
    assert module.a is not None
    assert module.b is not None
    return Unplaced(
        _label(module), f"A has shape {list(module.a.shape)} and B {list(module.b.shape)}, the base's {stored}"
    )


def _label(module: AdapterModule) -> str:
    return f"{module.module}.{module.parameter}"
