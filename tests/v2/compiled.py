"""A vLLM engine on a CPU that compiles its model with LoRA in it, as an engine on a GPU does. Only for tests.

In: a base model, an adapter, and for each engine to start in turn a folder for its trace, or "-" for an engine without
the probe; this folder on PYTHONPATH, and TRITON_INTERPRET=1. Out: a line of JSON for each engine, with the tokens of
each answer. vLLM's CPU platform switches compilation off as soon as LoRA is on, and
its CPU kernels for LoRA keep lengths in Python, which compiled code would freeze. So the platform's choice is undone,
and vLLM's wrapper for GPUs is used, whose metadata is in tensors, with its two Triton kernels written in torch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

PROMPT, TOKENS = 20, 24


def shrink(
    inputs: torch.Tensor,
    lora_a_weights: list[torch.Tensor],
    output_tensor: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    token_indices_sorted_by_lora_ids: torch.Tensor,
    num_tokens_per_lora: torch.Tensor,
    lora_token_start_loc: torch.Tensor,
    lora_ids: torch.Tensor,
    no_lora_flag_cpu: torch.Tensor,
    num_active_loras: torch.Tensor,
    scaling: float,
) -> None:
    """`lora_shrink`: s·x·Aᵀ of every slice, and zeros for rows without an adapter."""
    if no_lora_flag_cpu.item():
        return
    output_tensor.zero_()
    for slot in token_lora_mapping.unique().tolist():
        rows = token_lora_mapping == slot
        if slot >= 0:
            for number, weight in enumerate(lora_a_weights):
                output_tensor[number, rows] = scaling * (inputs[rows] @ weight[slot].squeeze(0).T).float()


def expand(
    inputs: torch.Tensor,
    lora_b_weights: list[torch.Tensor],
    output_tensor: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    token_indices_sorted_by_lora_ids: torch.Tensor,
    num_tokens_per_lora: torch.Tensor,
    lora_token_start_loc: torch.Tensor,
    lora_ids: torch.Tensor,
    no_lora_flag_cpu: torch.Tensor,
    num_active_loras: torch.Tensor,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """`lora_expand`: the shrink of every slice times Bᵀ, added to that slice of the output."""
    if no_lora_flag_cpu.item():
        return
    for slot in token_lora_mapping.unique().tolist():
        rows, begin = token_lora_mapping == slot, offset_start
        for number, weight in enumerate(lora_b_weights):
            end = begin + weight.shape[-2]
            if slot >= 0:
                delta = (inputs[number, rows].to(weight.dtype) @ weight[slot].squeeze(0).T).to(output_tensor.dtype)
                output_tensor[rows, begin:end] = delta + output_tensor[rows, begin:end] * add_inputs
            begin = end


def force_compilation() -> None:
    """Compile with Inductor from the next engine on. To be called before an engine's modules are imported."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    decide = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        decide(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        vllm_config.compilation_config.backend = "inductor"

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    use_gpu_wrapper()


def use_gpu_wrapper() -> None:
    """Apply LoRA with vLLM's wrapper for GPUs from the next engine on."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    def direct_register_custom_op(op_name: str, op_func: Any, *args: Any, **kwargs: Any) -> Any:
        kernels = {"lora_shrink": shrink, "lora_expand": expand}
        return register(op_name, kernels.get(op_name, op_func), *args, **kwargs)

    wrapper = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    torch_utils.direct_register_custom_op = direct_register_custom_op
    # The V1 runner's sampler has a Triton kernel that the interpreter cannot run.
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def answers(model: str, adapter: str) -> list[list[int]]:
    """The tokens of eight requests in mixed batches of two with the adapter and two without."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=model,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=2,
        max_model_len=256,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        max_num_seqs=4,
    )
    request = LoRARequest("adapter", 1, adapter)
    prompts = [{"prompt_token_ids": [(7 * number + token) % 250 + 3 for token in range(PROMPT)]} for number in range(8)]
    asked = [request if number % 2 else None for number in range(8)]
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=asked)
    if "LORA_PROBE_TRACE" in os.environ:
        llm.collective_rpc("lora_probe_finish")
    return [[int(token) for token in output.outputs[0].token_ids] for output in outputs]


if __name__ == "__main__":
    from lora_probe_vllm import register

    base, lora, *traces = sys.argv[1:]
    force_compilation()
    for trace in traces:
        if trace != "-":
            os.environ["LORA_PROBE_TRACE"] = trace
            # vLLM calls its plugins once in a process, and did so before the first engine.
            register()
        print(json.dumps(answers(base, lora)), flush=True)
