"""A vLLM engine on a CPU that serves adapters of a mixture of experts, with faults of its own. Only for tests.

In: JSON on standard input, {"base", "trace": a folder, "ranks": 1 or 2, "three_d": bool,
"adapters": [{"name", "path", "fused": true or false, "fault": "", "swapped", "half" or "kernel"}]}, and this folder on
PYTHONPATH, and TRITON_INTERPRET=1. Out: two lines of JSON, the tokens by adapter or vLLM's refusal: of the first two
adapters before the probe began, and of all of them with it. The faults are in layer 1: experts 1 and 2 are swapped in
the slot, s·B of expert 3's down_proj is halved in it, or its kernel writes half of it. Two ranks are processes of their
own, which have the kernels (`sitecustomize.py`) and no faults.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import experts
import torch
from compiled import use_gpu_wrapper

PROMPTS = [[(7 * number + token) % 250 + 3 for token in range(6)] for number in range(3)]
LAYER = "model.layers.1.mlp.experts"


def add_faults(faults: dict[str, str]) -> None:
    """Break what vLLM does for the adapters with a fault, by the engine's id."""
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    active: list[str] = [""]
    routed: list[torch.Tensor] = []
    layers: list[Any] = []
    fills = {kind: kind.set_lora for kind in (FusedMoEWithLoRA, FusedMoE3DWithLoRA)}
    activate = LoRAModelManager.activate_adapter
    w13, w2 = PunicaWrapperGPU.add_lora_w13, PunicaWrapperGPU.add_lora_w2

    def activate_adapter(self: Any, lora_id: int, *args: Any) -> Any:
        active[0] = faults.get(str(lora_id), "")
        layers[:] = [self.modules[LAYER]]
        return activate(self, lora_id, *args)

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        fault = active[0] if self is layers[0] else ""
        if fault == "swapped":
            lora_a, lora_b = ([part[[0, 2, 1, 3]] for part in parts] for parts in (lora_a, lora_b))
        fills[type(self)](self, index, lora_a, lora_b)
        if fault == "half":
            self.w2_lora_b_stacked[0][index, 3] /= 2

    def add_lora_w13(self: Any, y: Any, x: Any, a: Any, b: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
        routed[:] = [topk_ids]
        return w13(self, y, x, a, b, topk_ids, *args, **kwargs)

    def add_lora_w2(self: Any, y: Any, x: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> None:
        before = y.clone()
        w2(self, y, x, a, b, *args, **kwargs)
        if active[0] == "kernel" and a[0] is layers[0].w2_lora_a_stacked[0]:
            y -= (y - before) / 2 * (routed[0] == 3).unsqueeze(-1)

    FusedMoEWithLoRA.set_lora = FusedMoE3DWithLoRA.set_lora = set_lora
    LoRAModelManager.activate_adapter = activate_adapter
    PunicaWrapperGPU.add_lora_w13, PunicaWrapperGPU.add_lora_w2 = add_lora_w13, add_lora_w2


def start(base: str, ranks: int, three_d: bool) -> Any:
    """An engine with both layouts of experts, or with that of models whose experts are one tensor (`three_d`), whose
    probe does not record yet."""
    from vllm import LLM

    if three_d:
        from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

        Qwen3MoeForCausalLM.is_3d_moe_weight = True
    settings: dict[str, Any] = {"enable_mixed_moe_lora_format": not three_d, "enforce_eager": True, "max_model_len": 64}
    settings |= {"tensor_parallel_size": ranks}
    llm = LLM(base, dtype="float32", enable_lora=True, max_lora_rank=8, max_loras=2, **settings)
    llm.collective_rpc("lora_probe_finish")
    return llm


def answers(llm: Any, adapters: list[dict[str, str]], faults: dict[str, str], first: int) -> dict[str, Any]:
    """The tokens of every adapter, one adapter at a time beside a request for the base, or its refusal. `first` is the
    engine's id of the first one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    results: dict[str, Any] = {}
    for number, adapter in enumerate(adapters, start=first):
        faults[str(number)] = adapter["fault"]
        request = LoRARequest(adapter["name"], number, adapter["path"], is_3d_lora_weight=adapter["fused"])
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            results[adapter["name"]] = type(error).__name__
            continue
        outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=[request, None, request])
        results[adapter["name"]] = [[int(token) for token in output.outputs[0].token_ids] for output in outputs]
    return results


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    use_gpu_wrapper()
    experts.add_kernels()
    by_id: dict[str, str] = {}
    add_faults(by_id)
    os.environ["LORA_PROBE_TRACE"] = wanted["trace"] + ".first"
    engine = start(wanted["base"], wanted["ranks"], wanted["three_d"])
    print(json.dumps(answers(engine, wanted["adapters"][:2], by_id, 101)), flush=True)
    engine.collective_rpc("lora_probe_begin", args=(wanted["trace"],))
    print(json.dumps(answers(engine, wanted["adapters"], by_id, 1)), flush=True)
    engine.collective_rpc("lora_probe_finish")
