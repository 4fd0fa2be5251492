"""Fixtures with real parts: tiny Llama and Qwen2 base models with a byte tokenizer, PEFT adapters for them, and one
real vLLM engine for the whole run.

An adapter that may break an engine runs in a separate process (`lora_probe.trace`). All others share the engine, each
with a new id, and are removed after use.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from json_schemas import require_valid
from speed import FAST, forbid_torch, is_slow, is_slow_file
from written import edited as edited
from written import keep_answers, write_adapter, write_base

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# As in the children that lora-probe starts: threads that spin take the other process its core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

PROMPTS = ("Who are you?", "What is the capital of France?")
TARGETS = ("q_proj", "k_proj", "v_proj")
LAYERS = 3
SIZES = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "bos_token_id": None,
}


def pytest_configure(config: pytest.Config) -> None:
    """Engines' answers are cached for this run only: a stale one in the user's cache would hide a mistake.

    vLLM's own cache (what its classes are, by the digest of their source) stays where the user has it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache / "vllm"))
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lora-probe-tests-")
    if config.option.markexpr == FAST:
        forbid_torch(Path(tempfile.mkdtemp(prefix="lora-probe-tests-")))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that says itself that all of it is slow may import torch at its top."""
    return (config.option.markexpr == FAST and is_slow_file(collection_path)) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (
            item.get_closest_marker("engine")
            or item.get_closest_marker("browser")
            or (isinstance(item, pytest.Function) and is_slow(item))
        ):
            item.add_marker("slow")
    # Files with engines take longest, so they are begun first where several processes share the tests.
    first = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in first)


def pytest_sessionfinish(session: pytest.Session) -> None:
    heavy = {"torch", "transformers", "peft", "vllm"} & set(sys.modules)
    if session.config.option.markexpr == FAST and heavy:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nthe fast tests imported {', '.join(sorted(heavy))}", file=sys.stderr)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes: no merges, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<eos>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<reply>"
    fast.save_pretrained(folder)


def save_base(folder: Path, architecture: str = "llama", layers: int = LAYERS) -> Path:
    """A tiny random model of a real architecture, in float32, as Transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers}
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes)) if architecture == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, trained: float | None = None, **config: Any) -> Path:
    """An adapter as PEFT saves it, with a lora_B that has learned something: `trained` is how far it moved from its
    initialisation, by default it is all new."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": list(TARGETS), **config}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            before = parameter.detach().clone() * (trained is not None)
            torch.nn.init.normal_(parameter, std=0.05 if trained is None else trained)
            parameter.data += before
    model.save_pretrained(folder)
    return folder


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`lora-probe` in this process: status, standard output, standard error."""
    from lora_probe.cli.main import main

    words = [str(argument) for argument in arguments]
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    if ["--format", "json"] in [words[at : at + 2] for at in range(len(words))] and captured.out:
        require_valid(words, captured.out)
    return status, captured.out, captured.err


def heed_interrupts() -> None:
    """For a child process (`preexec_fn`): a shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def save_paligemma(folder: Path) -> Path:
    """A multimodal base of which there is nothing but the config."""
    from transformers import PaliGemmaConfig

    text = {key: value for key, value in SIZES.items() if value is not None} | {"model_type": "gemma", "head_dim": 32}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14},
        projection_dim=128,
        image_token_index=280,
    )
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _answers() -> None:
    keep_answers()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal base of which there is nothing but the config."""
    return write_base(tmp_path_factory.mktemp("paligemma") / "base", "paligemma")


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy adapter: q, k, v of every layer, r 8, scaling 2."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "healthy", llama)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy trace that holds everything that a trace can."""
    from traces import write

    return write(tmp_path_factory.mktemp("traces") / "good.lptrace")


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "damaged.lptrace"))


@pytest.fixture
def bounded() -> Iterator[None]:
    """What reads without bounds fails, and the machine goes on."""
    from traces import little_memory

    with little_memory():
        yield


@dataclass
class SharedEngine:
    """One in-process vLLM engine with the probe in it, for many recordings."""

    llm: Any
    model: Path
    numbers: Iterator[int]

    def record(self, adapter: Path, folder: Path, **spec: Any) -> Any:
        """The same recording as `trace --engine vllm`, without starting another engine. Returns the opened trace."""
        from lora_probe import open_trace
        from lora_probe.engines.launch import versions
        from lora_probe.recording import SCHEMA, Process, Prompt, Run, RunSpec, TraceWriter, write_json
        from lora_probe_vllm.engine import ask

        number = next(self.numbers)
        keep = spec.pop("keep", "shrink")
        asked = [Prompt(text) for text in spec.pop("prompts", PROMPTS)]
        settings = {"max_tokens": 6, "keep": keep} | spec
        run = RunSpec("vllm", str(adapter), adapter.name, str(self.model), asked, **settings)
        folder.mkdir(parents=True)
        write_json(folder / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", run, versions()))
        process = Process(SCHEMA, "client", "vllm", 0, os.getpid(), {})
        self.llm.collective_rpc("lora_probe_begin", args=(str(folder),))
        try:
            with TraceWriter(folder / "client", process) as writer:
                ask(self.llm, run, writer, adapter_id=number)
        finally:
            self.llm.llm_engine.remove_lora(number)
        return open_trace(folder)


_STARTED: list[Any] = []


def start_engine(model: Path, first: Path, **settings: Any) -> SharedEngine:
    """A real vLLM engine (CPU build, float32, one slot) with the probe in it; `first` is where the probe begins."""
    os.environ["LORA_PROBE_TRACE"] = str(first)
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_logprobs": -1,
    }
    llm = LLM(model=str(model), **(defaults | settings))
    # An engine that is collected takes the process groups of all others in this process with it.
    _STARTED.append(llm)
    del os.environ["LORA_PROBE_TRACE"]
    llm.collective_rpc("lora_probe_finish")
    return SharedEngine(llm, model, itertools.count(1))


@pytest.fixture(scope="session")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedEngine]:
    """The engine of the whole run, started once."""
    yield start_engine(llama, tmp_path_factory.mktemp("engine") / "first.lptrace")
    from lora_probe_vllm.patching import disarm

    disarm()


@pytest.fixture
def peft_trace(adapter: Path, llama: Path, tmp_path: Path) -> Any:
    return record_peft(adapter, llama, tmp_path / "peft.lptrace")


def record_peft(adapter: Path, base: Path, folder: Path, **changes: Any) -> Any:
    """The same recording as `trace --engine peft`, in this process."""
    from lora_probe import open_trace
    from lora_probe.engines.launch import versions
    from lora_probe.engines.peft.engine import PeftEngine
    from lora_probe.recording import SCHEMA, Prompt, Run, RunSpec, write_json

    settings: dict[str, Any] = {"max_tokens": 6, "options": {"dtype": "float32"}, "prompts": PROMPTS} | changes
    asked = [Prompt(text) for text in settings.pop("prompts")]
    spec = RunSpec("peft", str(adapter), adapter.name, str(base), asked, **settings)
    folder.mkdir(parents=True)
    write_json(folder / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, versions()))
    PeftEngine().record(spec, folder)
    return open_trace(folder)
