"""Engines that are measured: vLLM and PEFT, each in a process of its own, so that several can take turns.

In: an `EngineSpec`. Out: `Engine.answer`, which gives the same tokens to the engine and returns an `Answer`: what it
generated, and when. vLLM is stepped here and PEFT reports each token, so the times are taken where tokens appear.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_probe.recording.benchmarks import Of

START_SECONDS = 600
NO_PLUGIN = ""
"""A value of VLLM_PLUGINS: vLLM loads no plugin."""
FIRST = "first.lptrace"
"""The recording of an armed engine, in its folder: at level `events`, from its start."""


FIRST_STEPS, STEPS = 8, 32
"""Steps that do not count and those that do, where recorded steps take turns with others. Requests are sampled in their
first steps alone. The first number is even, so that the first step that counts is not recorded."""


class EngineError(Exception):
    """The engine did not start, or did not answer; the message is its own."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine. `probe` is `absent` (the plugin is not loaded), `idle` (loaded, not asked to record) or `armed`.
    `flags` are vLLM's engine flags; `merged` asks PEFT to merge the adapter before it answers. Specs that differ in
    `start` are the same engine in two processes."""

    kind: str
    model: str
    dtype: str
    batch: int
    lora: bool = True
    probe: str = "idle"
    max_rank: int = 8
    max_loras: int = 1
    flags: tuple[str, ...] = ()
    adapter: str = ""
    merged: bool = False
    start: int = 0


@dataclass(frozen=True)
class Answer:
    """What one batch of requests got. Times are seconds from the moment of the call: `first` and `last` of each
    request's first and last token, `seconds` until the call returned."""

    tokens: tuple[tuple[int, ...], ...]
    prompts: int
    first: tuple[float, ...]
    last: tuple[float, ...]
    seconds: float

    @property
    def outputs(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def rates(self) -> dict[str, float]:
        """The three figures of `vllm bench throughput` and the two latencies of `vllm bench serve`, under their names
        there; and the tokens per second before and after the last first token (prefill, decode)."""
        count, prefill = len(self.tokens), max(self.first)
        per_token = [(b - a) / (len(of) - 1) for a, b, of in zip(self.first, self.last, self.tokens, strict=True)]
        return {
            "requests_per_second": count / self.seconds,
            "total_tokens_per_second": (self.prompts + self.outputs) / self.seconds,
            "output_tokens_per_second": self.outputs / self.seconds,
            "mean_ttft_ms": 1e3 * sum(self.first) / count,
            "mean_tpot_ms": 1e3 * sum(per_token) / count,
            "prefill_tokens_per_second": self.prompts / prefill,
            "decode_tokens_per_second": (self.outputs - count) / (max(self.last) - prefill),
        }


SPEEDS: dict[Of, Callable[[Answer], float]] = {
    "speed": lambda answer: answer.rates["output_tokens_per_second"],
    "prefill": lambda answer: answer.rates["prefill_tokens_per_second"],
    "decode": lambda answer: answer.rates["decode_tokens_per_second"],
}
"""The speeds whose ratios are taken."""


@dataclass
class Engine:
    """A running engine. `call` runs a method of it by name; errors there are raised here as EngineError."""

    spec: EngineSpec
    folder: Path
    process: Any
    pipe: Any
    loaded: dict[str, int] = field(default_factory=dict)

    def call(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        if not self.pipe.poll(START_SECONDS):
            raise EngineError(f"no answer to `{method}` after {START_SECONDS} s")
        try:
            status, result = self.pipe.recv()
        except EOFError:
            raise EngineError(f"the engine's process ended during `{method}`") from None
        if status == "error":
            raise EngineError(result)
        return result

    def load(self, adapter: str) -> int:
        """The number under which the engine has the adapter; it is loaded if it is new."""
        if adapter not in self.loaded:
            number = len(self.loaded) + 1
            self.call("load", number, adapter)
            self.loaded[adapter] = number
        return self.loaded[adapter]

    def unload_all(self) -> None:
        for number in self.loaded.values():
            self.call("unload", number)
        self.loaded.clear()

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int, adapters: Sequence[str | None]) -> Answer:
        """Every prompt is answered with `tokens` tokens, by the adapter of its place in `adapters` in turn."""
        answer: Answer = self._decode("answer", prompts, tokens, adapters)
        return answer

    def steps_in_turn(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[float]:
        """The same in an engine that records, which is switched off for every second step of decoding. Returns the
        speed of each recorded step relative to the steps beside it."""
        speeds: list[float] = self._decode("steps_in_turn", prompts, FIRST_STEPS + STEPS, adapters)
        return speeds

    def _decode(
        self, method: str, prompts: Sequence[Sequence[int]], tokens: int, adapters: Sequence[str | None]
    ) -> Any:
        turns = [None if path is None else (self.load(path), path) for path in adapters]
        return self.call(method, [list(ids) for ids in prompts], tokens, turns)

    def close(self) -> None:
        self.pipe.close()
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()


def start(spec: EngineSpec, folder: Path) -> Engine:
    """Start an engine; an armed one records below `folder`. Its log goes to `folder/engine.log`.

    Raises:
        EngineError: it did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A fresh interpreter: forked threads of torch hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(spec, folder, theirs))
    process.start()
    theirs.close()
    engine = Engine(spec, folder, process, ours)
    try:
        engine.call("ready")
    except EngineError as error:
        log = (folder / "engine.log").read_text(errors="replace").splitlines()[-15:]
        engine.close()
        raise EngineError("\n".join([f"{spec.kind} did not start: {error}", *log])) from error
    return engine


def _serve(spec: EngineSpec, folder: Path, pipe: Any) -> None:
    """The engine's process: one answer for each call, until the pipe is closed."""
    with (folder / "engine.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        served: Any = InVllm(spec, folder) if spec.kind == "vllm" else InPeft(spec)
    # An engine may raise anything when it starts.
    except Exception as error:
        pipe.recv()
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("ok", getattr(served, method)(*arguments)))
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)


class InVllm:
    """vLLM in this process."""

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if spec.probe == "absent":
            os.environ["VLLM_PLUGINS"] = NO_PLUGIN
        if spec.probe == "armed":
            os.environ["LORA_PROBE_TRACE"], os.environ["LORA_PROBE_KEEP"] = str(folder / FIRST), "events"
        from vllm import LLM
        from vllm.platforms import current_platform

        from lora_probe_vllm.llm import parse_flags

        arguments: dict[str, Any] = {
            "model": spec.model,
            "dtype": spec.dtype,
            "max_model_len": 1024,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_num_seqs": spec.batch,
        }
        if spec.lora:
            arguments |= {"enable_lora": True, "max_lora_rank": spec.max_rank, "max_loras": spec.max_loras}
        if not current_platform.is_cpu():
            # Three engines are alive at the same time.
            arguments["gpu_memory_utilization"] = 0.28
        self.llm = LLM(**(arguments | parse_flags(list(spec.flags))))
        self._number = 0

    def ready(self) -> str:
        from lora_probe_vllm.seams import vllm_version

        return vllm_version()

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        tokenizer = self.llm.get_tokenizer()
        return [tokenizer(text).input_ids for text in texts]

    def load(self, number: int, path: str) -> None:
        if not self.llm.llm_engine.add_lora(self._request(number, path)):
            raise EngineError(f"vLLM did not load {path}")

    def unload(self, number: int) -> None:
        self.llm.llm_engine.remove_lora(number)

    def begin(self, folder: str, keep: str) -> None:
        self.llm.collective_rpc("lora_probe_begin", args=(folder, keep))

    def finish(self) -> None:
        self.llm.collective_rpc("lora_probe_finish")

    def answer(self, prompts: list[list[int]], tokens: int, turns: list[tuple[int, str] | None]) -> Answer:
        engine = self.llm.llm_engine
        first, last, said = {}, {}, {}
        began = time.perf_counter()
        ids = self._submit(prompts, tokens, turns)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                if not output.outputs[0].token_ids:
                    continue
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
                said[output.request_id] = tuple(output.outputs[0].token_ids)
        seconds = time.perf_counter() - began
        return Answer(
            tuple(said[name] for name in ids),
            sum(map(len, prompts)),
            tuple(first[name] for name in ids),
            tuple(last[name] for name in ids),
            seconds,
        )

    def steps_in_turn(self, prompts: list[list[int]], tokens: int, turns: list[tuple[int, str] | None]) -> list[float]:
        """Decode the same batch, with every second step recorded. Returns the speed of each recorded step, relative to
        the mean of the two beside it, which are not recorded. The first steps, in which samples are compared with the
        file, are all recorded and do not count. Workers that are processes of their own have no switch: they record
        all steps, and nothing is returned."""
        from lora_probe_vllm.seams import Patches

        engine = self.llm.llm_engine
        if engine.vllm_config.parallel_config.world_size > 1:
            self.answer(prompts, tokens, turns)
            return []
        (runner,) = self.llm.collective_rpc(lambda worker: worker.model_runner)
        seconds: list[float] = []
        self._submit(prompts, tokens, turns)
        while engine.has_unfinished_requests():
            with Patches() as patches:
                if len(seconds) >= FIRST_STEPS and len(seconds) % 2 == 0:
                    patches.wrap(runner, "execute_model", lambda recording: recording.__wrapped__.__get__(runner))
                began = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - began)
        recorded = range(FIRST_STEPS + 1, len(seconds) - 1, 2)
        return [(seconds[step - 1] + seconds[step + 1]) / 2 / seconds[step] for step in recorded]

    def _submit(self, prompts: list[list[int]], tokens: int, turns: list[tuple[int, str] | None]) -> list[str]:
        """Add a request for each prompt. Returns their ids."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = []
        for number, prompt in enumerate(prompts):
            turn = turns[number % len(turns)]
            self._number += 1
            ids.append(str(self._number))
            request = None if turn is None else self._request(*turn)
            self.llm.llm_engine.add_request(ids[-1], {"prompt_token_ids": prompt}, parameters, lora_request=request)
        return ids

    def _request(self, number: int, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{number}", number, path)


class InPeft:
    """transformers and PEFT in this process. The prompts of a batch have the same length."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=getattr(torch, spec.dtype)).to(device)
        if spec.adapter:
            model = PeftModel.from_pretrained(model, spec.adapter)
        if spec.merged:
            model = model.merge_and_unload()
        self.model, self.device = model.eval(), device

    def ready(self) -> str:
        import peft

        return str(peft.__version__)

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer(text).input_ids for text in texts]

    def answer(self, prompts: list[list[int]], tokens: int, turns: list[tuple[int, str] | None]) -> Answer:
        import torch
        from transformers import StoppingCriteriaList

        at: list[float] = []

        def noted(ids: Any, scores: Any, **options: Any) -> Any:
            at.append(time.perf_counter() - began)
            return torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)

        length = max(map(len, prompts))
        padding = self.tokenizer.eos_token_id or 0
        inputs = torch.tensor([[padding] * (length - len(ids)) + ids for ids in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                inputs=inputs,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=padding,
                stopping_criteria=StoppingCriteriaList([noted]),
            )
        seconds = time.perf_counter() - began
        said = tuple(tuple(row[length:].tolist()) for row in output)
        count = len(prompts)
        return Answer(said, sum(map(len, prompts)), (at[0],) * count, (at[-1],) * count, seconds)


@dataclass
class Engines:
    """The engines that are alive, at most `most` at a time: the one that was used least recently is closed."""

    folder: Path
    most: int = 3
    alive: dict[EngineSpec, Engine] = field(default_factory=dict)
    started: int = 0

    def get(self, spec: EngineSpec) -> Engine:
        engine = self.alive.pop(spec, None)
        if engine is None:
            while len(self.alive) >= self.most:
                self.alive.pop(next(iter(self.alive))).close()
            self.started += 1
            engine = start(spec, self.folder / f"engine-{self.started}")
        self.alive[spec] = engine
        return engine


@contextmanager
def engines(folder: Path) -> Iterator[Engines]:
    """A place for engines; all are closed at the end."""
    place = Engines(folder)
    try:
        yield place
    finally:
        for engine in place.alive.values():
            engine.close()
