"""The server engine: the same tokens through a server's base model and through an adapter of it.

In: a `RunSpec` with the server's URL among its options, and `adapter` as the folder that the server is said to serve,
or None. Out: the folder `server/` of a trace. Every pass runs twice, so that the server's own noise is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np

from lora_probe.adapter import open_adapter
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.prompts import encode
from lora_probe.engines.server.client import Answer, Card, Client, Prompt
from lora_probe.engines.server.verdict import Doubles, Passes, judged
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files import shown
from lora_probe.recording import SCHEMA, Load, NextTokens, Process, RequestRecord, RunSpec, TraceWriter
from lora_probe.rules.stored import expect

if TYPE_CHECKING:
    from lora_probe.engines.peft.scorer import Scorer

REPETITIONS = 2
NOT_SHOWN = "the server does not show its layers"
"""Why the stations inside an engine are unknown."""


class ServerEngine:
    """Entry point `server` of the group `lora_probe.engines`. `options` of its spec are `url`, `request_timeout` and
    `served_base`, the name of the base model there if the server does not state it; and `dtype`, for PEFT."""

    has_flags = False

    def record(self, spec: RunSpec, folder: Path) -> None:
        """See `lora_probe.engines.Engine.record`."""
        if "url" not in spec.options:
            raise ProbeError(
                "the engine `server` runs no model by itself", "lora-probe trace --engine server --url ..."
            )
        process = Process(
            schema=SCHEMA,
            role="engine",
            engine="server",
            rank=0,
            pid=os.getpid(),
            versions={"httpx": httpx.__version__},
            keep="events",
            device="",
        )
        client = Client(str(spec.options["url"]), float(spec.options["request_timeout"]))
        with client, TraceWriter(folder / "server", process) as writer:
            _record(spec, client, writer)


def _record(spec: RunSpec, client: Client, writer: TraceWriter) -> None:
    adapter, base = served(client, spec.name, spec.options.get("served_base"))
    root = f" from {adapter.root}" if adapter.root else ""
    writer.event("models", f"{client.url} serves `{adapter.id}`{root} on its base `{base}`")
    scorer = _scorer(spec, writer)
    record = _announced(spec, adapter, scorer, writer)
    prompts = _prompts(spec, scorer)
    texts = [_answered(client, spec, number, prompt, base, writer, scorer) for number, prompt in enumerate(prompts)]
    passes = _passes(client, spec.name, base, texts, writer)
    if scorer is None or spec.adapter is None:
        writer.record(judged(0, spec.name, base, passes))
    else:
        ids = [text for text in texts if isinstance(text, list)]

        def in_peft(scaling: float) -> Doubles:
            return np.concatenate(_in_peft(scorer, ids, scaling, writer))

        writer.record(judged(0, spec.name, base, passes, spec.model, in_peft, scorer.scalable))
    if record is not None:
        record.finish(lambda _: NOT_SHOWN)


def served(client: Client, name: str, base: str | None) -> tuple[Card, str]:
    """The adapter in the server's list of models, and the name of its base model there.

    Raises:
        EngineFailed: the server does not serve the adapter, or no base of it.
    """
    cards = {card.id: card for card in client.models()}
    names = ", ".join(f"`{shown(known)}`" for known in list(cards)[:20])
    if name not in cards:
        raise EngineFailed(
            f"the server at {client.url} does not serve `{name}`; it serves {names or 'nothing'}",
            "pass one of these names with --adapter, or load the adapter first (vLLM: POST /v1/load_lora_adapter)",
        )
    if base is not None and base not in cards:
        raise EngineFailed(
            f"the server at {client.url} does not serve `{base}`; it serves {names}", "see --served-base"
        )
    parent = base or cards[name].parent
    others = [card.id for card in cards.values() if card.id != name and card.parent is None]
    if parent not in cards:
        # Of several names of one base model, vLLM states only the first; other servers state none.
        parent = others[0] if len(others) == 1 else None
    if parent is None or parent == name:
        raise EngineFailed(
            f"the server at {client.url} does not state which model is the base of `{name}`; it serves {names}",
            "pass the base model's name there with --served-base; a base model is no adapter of itself",
        )
    return cards[name], parent


def _scorer(spec: RunSpec, writer: TraceWriter) -> Scorer | None:
    if spec.adapter is None:
        return None
    from lora_probe.engines import require
    from lora_probe.engines.peft.scorer import Scorer

    require("peft")
    writer.event("peft", f"loading {spec.model} with {spec.adapter} in PEFT, to compare the server with it")
    return Scorer(spec, writer)


def _announced(spec: RunSpec, card: Card, scorer: Scorer | None, writer: TraceWriter) -> LoadRecord | None:
    """Write the load: with the modules of its folder, if that is known."""
    if spec.adapter is None or scorer is None:
        writer.record(Load(0, spec.name, card.root or "a server", ""))
        return None
    adapter = open_adapter(spec.adapter)
    load = Load(0, spec.name, str(adapter.path), adapter.digest())
    record = LoadRecord(writer, load, adapter, expect(adapter, scorer.shapes), "float32")
    record.announce({})
    return record


def _prompts(spec: RunSpec, scorer: Scorer | None) -> Sequence[Prompt]:
    """Token ids if the tokenizer is known: then every engine sees the same tokens."""
    if scorer is None:
        return [prompt.text for prompt in spec.prompts]
    return encode(spec, scorer.tokenizer)


def _answered(
    client: Client,
    spec: RunSpec,
    number: int,
    prompt: Prompt,
    base: str,
    writer: TraceWriter,
    scorer: Scorer | None,
) -> Prompt:
    """Both answers to a prompt. Returns the prompt with the adapter's answer, whose tokens are compared."""
    texts = []
    for model, request in ((base, f"base-{number}"), (spec.name, f"lora-{number}")):
        started = time.perf_counter()
        answer = client.generate(model, prompt, spec.max_tokens)
        ids = _ids(answer, scorer)
        writer.request(
            RequestRecord(
                request,
                number,
                None if model == base else spec.name,
                list(prompt) if isinstance(prompt, list) else list(answer.prompt_ids),
                ids,
                answer.text,
                logprobs=[None if value is None else round(value, 6) for value in answer.logprobs],
                seconds=round(time.perf_counter() - started, 3),
            )
        )
        texts.append(prompt + ids if isinstance(prompt, list) else prompt + answer.text)
    return texts[1]


def _ids(answer: Answer, scorer: Scorer | None) -> list[int]:
    if answer.ids or scorer is None:
        return list(answer.ids)
    return list(scorer.tokenizer(answer.text, add_special_tokens=False).input_ids)


def _passes(client: Client, adapter: str, base: str, texts: Sequence[Prompt], writer: TraceWriter) -> Passes:
    """The log-probabilities of all texts, with and without the adapter in turn."""
    values: dict[tuple[str, int], list[Doubles]] = {}
    for number, text in enumerate(texts):
        tokens: set[tuple[str, ...]] = set()
        for repetition in range(REPETITIONS):
            for model in (base, adapter):
                scores = client.score(model, text)
                tokens.add(scores.tokens)
                writer.record(NextTokens(f"lora-{number}", model, list(scores.logprobs), repetition))
                values.setdefault((model, repetition), []).append(_numbers(client, scores.logprobs))
        if len(tokens) > 1:
            raise EngineFailed(
                f"the server at {client.url} reads prompt {number + 1} as other tokens with the adapter",
                "the adapter has a tokenizer of its own; pass its folder, so that token ids are sent",
            )
        writer.event("score", f"compared the tokens of prompt {number + 1} of {len(texts)}")
    of = {key: np.concatenate(parts) for key, parts in values.items()}
    if not len(of[base, 0]):
        raise EngineFailed("there are no tokens to compare: prompts and answers have one token each", "pass --prompt")
    return Passes((of[base, 0], of[base, 1]), (of[adapter, 0], of[adapter, 1]))


def _numbers(client: Client, logprobs: Sequence[float | None]) -> Doubles:
    """All but the first, which has none."""
    numbers = np.array([np.nan if value is None else value for value in logprobs[1:]], np.float64)
    if not np.isfinite(numbers).all():
        raise EngineFailed(
            f"the server at {client.url} returns log-probabilities that are not numbers",
            "look at its log: an adapter with NaN or infinity in it makes every answer noise",
        )
    return numbers


def _in_peft(scorer: Scorer, texts: Sequence[list[int]], scaling: float, writer: TraceWriter) -> list[Doubles]:
    parts = scorer.logprobs(texts, scaling)
    writer.event("peft", f"ran the same tokens in PEFT at {scaling:.4g} times the trained scaling")
    for number, values in enumerate(parts):
        logprobs = [None, *(round(float(value), 6) for value in values)]
        writer.record(NextTokens(f"lora-{number}", "peft", logprobs, scaling=scaling))
    return parts
