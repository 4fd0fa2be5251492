"""vLLM's `LLM`: its arguments, its start, and its outputs.

In: a `RunSpec`. Out: a live engine, requests for adapters, and what the engine answers to token ids.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_probe.adapter import Adapter, open_adapter
from lora_probe.base import open_base
from lora_probe.errors import EngineFailed, ProbeError, UnreadableFile
from lora_probe.recording import NamedAdapter, RunSpec
from lora_probe_vllm import NOT_ARMED
from lora_probe_vllm.pooled import arguments_for
from lora_probe_vllm.seams import root_cause

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables of engines that `trace` starts, unless the user has set them."""

MAX_MODEL_LEN = 4096


def set_environment() -> None:
    """Set the variables that the user has not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def engine_arguments(spec: RunSpec) -> dict[str, Any]:
    """The arguments of `vllm.LLM`: defaults, then the spec's options, then flags checked by vLLM's own parser.

    Raises:
        ProbeError: vLLM's parser does not accept a flag or a value.
    """
    arguments: dict[str, Any] = {
        "model": spec.model,
        "trust_remote_code": False,
        "enable_lora": spec.adapter is not None,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": max(4, len(spec.beside) + 2),
        "max_model_len": _max_model_len(spec.model),
    }
    if spec.beside:
        # The spare slot keeps vLLM's CPU kernels from giving the base the contribution of the last one.
        arguments["max_loras"] = len(spec.beside) + 2
    if spec.score:
        arguments["max_logprobs"] = -1
    elif spec.adapter is not None:
        arguments |= arguments_for(spec.adapter, spec.model)
    if spec.adapter is None:
        # All prompts are token ids, and a merged model may have no tokenizer.
        arguments["skip_tokenizer_init"] = True
    command = [part for key, value in spec.options.items() for part in _flag(key, value)]
    passed = parse_flags([*command, *spec.engine_args])
    return {key: value for key, value in (arguments | passed).items() if value is not None}


def _flag(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{key.replace('_', '-')}", *map(str, values)]


def _max_model_len(model: str) -> int | None:
    """A context that fits a small cache; None (vLLM's default) if the base model's config cannot be read."""
    try:
        longest = open_base(model).config.get("max_position_embeddings")
    except UnreadableFile:
        return None
    return min(longest, MAX_MODEL_LEN) if isinstance(longest, int) else None


def parse_flags(flags: list[str]) -> dict[str, Any]:
    """vLLM engine flags as arguments of `LLM`, only those that were passed."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise ProbeError(
                f"vLLM does not accept these flags: {message}",
                "see `python -m vllm.entrypoints.openai.api_server --help`",
            )

    parser = EngineArgs.add_cli_args(Parser(add_help=False))
    plain = vars(parser.parse_args([]))
    parsed = vars(parser.parse_args(flags))
    fields = EngineArgs.__dataclass_fields__
    words = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")]
    named = {word.removeprefix("no_") for word in words} | set(words)
    return {key: value for key, value in parsed.items() if key in fields and (key in named or value != plain[key])}


def start(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    try:
        return LLM(**arguments)
    # An engine may raise any exception when it starts; its message is passed on.
    except Exception as error:
        if isinstance(error, ProbeError):
            raise
        raise EngineFailed(f"vLLM did not start: {root_cause(error)}", "see the log for details") from error


def require_probe(folder: Path) -> None:
    """Require that the probe is in a worker: it writes process.json before the model is loaded.

    Raises:
        EngineFailed: there is no such file, so nothing would be recorded.
    """
    if any(folder.glob("vllm-*rank-*/process.json")):
        return
    if (folder / NOT_ARMED).exists():
        raise EngineFailed(f"the probe could not be started: {(folder / NOT_ARMED).read_text().strip()}")
    allowed = os.environ.get("VLLM_PLUGINS")
    why = (
        f"VLLM_PLUGINS is `{allowed}`; it must include lora_probe"
        if allowed is not None
        else ("is lora-probe-vllm installed in the environment of the workers?")
    )
    raise EngineFailed("the plugin was not loaded: no vLLM worker has the probe", why)


def request_for(llm: Any, number: int, named: NamedAdapter) -> Any:
    """How requests ask for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(named.name, number, named.path, **_layout(llm, open_adapter(named.path)))


def _layout(llm: Any, adapter: Adapter) -> dict[str, bool]:
    """What a request says of the adapter's experts to an engine with --enable-mixed-moe-lora-format."""
    mixed = getattr(llm.llm_engine.vllm_config.lora_config, "enable_mixed_moe_lora_format", False)
    fused = any(module.parameter != "weight" for module in adapter.modules)
    return {"is_3d_lora_weight": True} if mixed and fused else {}


def generate(llm: Any, number: int, ids: list[int], parameters: Any, requests: Sequence[Any]) -> list[Any]:
    """vLLM's outputs for the same tokens in one batch, once for each of `requests` for an adapter (None: without one).

    Raises:
        EngineFailed: with vLLM's message, for example if the prompt is too long or the engine died.
    """
    prompts = [{"prompt_token_ids": ids}] * len(requests)
    try:
        outputs: list[Any] = llm.generate(prompts, parameters, use_tqdm=False, lora_request=list(requests))
    # vLLM may raise any exception.
    except Exception as error:
        raise EngineFailed(f"vLLM did not answer prompt {number + 1}: {root_cause(error)}") from error
    return outputs
