"""Lets vLLM run fused experts with LoRA on a CPU: its Triton kernels in the interpreter. Only for tests.

In: this folder on PYTHONPATH, and TRITON_INTERPRET=1. Out: the four kernels of vLLM's compiled extension for experts
that its CPU build does not have, written in torch after their descriptions. The experts' own kernels, with and without
LoRA, and everything that calls them, are vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch

_MISSING = (
    "topk_softmax(Tensor! weights, Tensor! ids, Tensor! rows, Tensor logits, bool renormalize,"
    " Tensor? bias=None) -> ()",
    "moe_sum(Tensor input, Tensor! output, Tensor? ids=None, Tensor? expert_map=None) -> ()",
    "moe_align_block_size(Tensor ids, int experts, int block, Tensor! sorted_ids, Tensor! expert_ids,"
    " Tensor! total, Tensor? expert_map, Tensor? scatter=None) -> ()",
    "moe_lora_align_block_size(Tensor ids, Tensor token_slots, int experts, int block, int slots, int most_tokens,"
    " int most_blocks, Tensor! sorted_ids, Tensor! expert_ids, Tensor! totals, Tensor enabled, Tensor slot_ids,"
    " Tensor? expert_map) -> ()",
)
_library = torch.library.Library("_moe_C", "FRAGMENT")


def topk_softmax(
    weights: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    logits: torch.Tensor,
    renormalize: bool,
    bias: Any = None,
) -> None:
    """The experts of every token with the highest probabilities."""
    top = torch.softmax(logits.float(), dim=-1).topk(ids.shape[1], dim=-1)
    weights.copy_(top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values)
    ids.copy_(top.indices)


def moe_sum(input: torch.Tensor, output: torch.Tensor, ids: Any = None, expert_map: Any = None) -> None:
    """The sum over the experts of each token."""
    output.copy_(input.sum(dim=1))


def _align(ids: torch.Tensor, chosen: torch.Tensor, block: int, sorted_ids: torch.Tensor, blocks: torch.Tensor) -> int:
    """Sort the `chosen` places of `ids` by expert, and pad each expert's to whole blocks; unused places get a number
    that is too high. Returns how many there are."""
    flat, end = ids.flatten(), 0
    sorted_ids.fill_(flat.numel())
    for expert in flat[chosen].unique().tolist():
        own = ((flat == expert) & chosen).nonzero().flatten()
        sorted_ids[end : end + len(own)] = own.int()
        blocks[end // block : -(-(end + len(own)) // block)] = expert
        end = -(-(end + len(own)) // block) * block
    return end


def moe_align_block_size(
    ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    total: torch.Tensor,
    expert_map: Any,
    scatter: Any = None,
) -> None:
    """The tokens of each expert in blocks."""
    expert_ids.fill_(0)
    total.fill_(_align(ids, torch.ones(ids.numel(), dtype=torch.bool), block, sorted_ids, expert_ids))


def moe_lora_align_block_size(
    ids: torch.Tensor,
    token_slots: torch.Tensor,
    experts: int,
    block: int,
    slots: int,
    most_tokens: int,
    most_blocks: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    totals: torch.Tensor,
    enabled: torch.Tensor,
    slot_ids: torch.Tensor,
    expert_map: Any,
) -> None:
    """The tokens of each expert in blocks, apart for every slot."""
    of_tokens = token_slots[: len(ids)].repeat_interleave(ids.shape[1])
    totals.zero_()
    for slot in range(slots):
        own = (of_tokens == slot) & bool(enabled[slot])
        tokens, blocks = sorted_ids.view(slots, -1)[slot], expert_ids.view(slots, -1)[slot]
        totals[slot] = _align(ids, own, block, tokens, blocks)


def add_kernels() -> None:
    """Define the kernels. To be called before an engine starts."""
    for schema in _MISSING:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, globals()[name], "CompositeExplicitAutograd")
