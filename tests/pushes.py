"""Adapters pushed into a real vLLM engine as reinforcement-learning frameworks do it, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, SharedEngine

from lora_probe import open_trace

MODULES = 3 * LAYERS
WHOLE = f"{MODULES} of {MODULES} modules took effect"
IDS = [40, 41, 42, 43]
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none"}
Tensors = dict[str, Any]


def tensor_request(name: str, number: int, tensors: Tensors, config: dict[str, Any] = CONFIG, **flags: Any) -> Any:
    """As in verl: a LoRARequest with the tensors in it."""
    from vllm.lora.request import LoRARequest

    class TensorLoRARequest(LoRARequest):
        peft_config: dict[str, Any] = {}
        lora_tensors: dict[str, Any] = {}

    clones = {key: tensor.clone() for key, tensor in tensors.items()}
    request = TensorLoRARequest(name, number, "simple_lora_path", **flags)
    request.peft_config, request.lora_tensors = config, clones
    return request


def replace_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `_load_adapter` of the subclass that vLLM uses, as verl does it. That hides a patch on the base class."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    def load_adapter(self: Any, request: Any) -> Any:
        manager = self._adapter_manager
        if hasattr(request, "lora_tensors"):
            helper = PEFTHelper.from_dict(request.peft_config)
            helper.validate_legal(self.lora_config)
            return LoRAModel.from_lora_tensors(
                lora_model_id=request.lora_int_id,
                tensors=request.lora_tensors,
                peft_helper=helper,
                device="cpu",
                dtype=self.lora_config.lora_dtype,
            )
        helper = PEFTHelper.from_local_dir(request.lora_path, self.max_position_embeddings)
        names = {part for parts in manager.packed_modules_mapping.values() for part in parts}
        return self._lora_model_cls.from_local_checkpoint(
            request.lora_path,
            names,
            peft_helper=helper,
            lora_model_id=request.lora_int_id,
            device="cpu",
            dtype=self.lora_config.lora_dtype,
        )

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", load_adapter)


def tensors_of(adapter: Path) -> Tensors:
    from safetensors.torch import load_file

    return dict(load_file(adapter / "adapter_model.safetensors"))


def recorded(engine: SharedEngine, folder: Path, work: Callable[[], None], keep: str = "shrink") -> Any:
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), keep))
    work()
    engine.llm.collective_rpc("lora_probe_finish")
    return open_trace(folder)


def ask(engine: SharedEngine, number: int, name: str = "pushed", tokens: int = 3, **flags: Any) -> list[int]:
    """Ask for an adapter that the engine has, as a server does: by a plain request with its id."""
    from vllm.lora.request import LoRARequest

    return generate(engine, LoRARequest(name, number, "simple_lora_path", **flags), tokens)


def generate(engine: SharedEngine, request: Any, tokens: int = 3) -> list[int]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": IDS}
    return list(engine.llm.generate([prompt], parameters, use_tqdm=False, lora_request=request)[0].outputs[0].token_ids)


def push(engine: SharedEngine, request: Any) -> None:
    engine.llm.llm_engine.add_lora(request)


def manager_of(engine: SharedEngine) -> Any:
    (manager,) = engine.llm.collective_rpc(lambda worker: [worker.model_runner.lora_manager._adapter_manager])[0]
    return manager


def stages(trace: Any) -> list[str]:
    return [event.stage for event in trace.events]


def past_the_loader(engine: SharedEngine, number: int, tensors: Tensors, remove: bool = True) -> None:
    """As in AReaL: the manager's own methods, and no request."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    clones = {name: tensor.clone() for name, tensor in tensors.items()}

    def add(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        helper = PEFTHelper.from_dict(CONFIG)
        lora = LoRAModel.from_lora_tensors(number, clones, helper, device="cpu")
        if remove:
            manager.remove_adapter(number)
        manager._add_adapter(lora)
        manager.activate_adapter(number)

    engine.llm.collective_rpc(add)
