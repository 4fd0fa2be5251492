"""Throughput with and without an adapter, with and without the probe, in vLLM and in PEFT.

Every mode answers the same prompts with the same number of tokens, in turn with the mode that it is compared with. Each
mode checks that it measures the right thing: all tokens were generated, the adapter has taken effect (by the ledger of
an armed engine, and by the same tokens in the others), rows were recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Settings
from engines import SPEEDS, STEPS, Answer, Engine, Engines, EngineSpec
from made import save_like
from rounds import Results, Rounds, take_turns, timed_by

from lora_probe import open_trace, parity
from lora_probe.ledger import headline
from lora_probe.recording import DECODE
from lora_probe.recording.benchmarks import MERGED, THROUGHPUT, WITH_ADAPTER, Measured, Ratio, middle
from lora_probe.rules.lp4_serving import MAX_RANKS

pytestmark = pytest.mark.timeout(0)

FAR_ABOVE = 8
"""How many times the rank `--max-lora-rank` is where it is far above it."""
RANKS = (8, 16, 64)


@dataclass(frozen=True)
class Mode:
    """What answers: an engine, and the adapters of the requests in turn (None: without one)."""

    name: str
    spec: EngineSpec
    adapters: tuple[str | None, ...]


Ask = Callable[[Mode], Answer]


@pytest.fixture(scope="module")
def spec(settings: Settings) -> EngineSpec:
    """vLLM with the adapter's own rank and one slot; the plugin is not loaded."""
    return EngineSpec(
        "vllm", settings.model, settings.dtype, settings.batch, probe="absent", max_rank=settings.max_rank,
        flags=settings.flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ask(place: Engines, settings: Settings) -> Ask:
    """One batch of requests to the engine of a mode."""
    tokens_of: dict[str, list[list[int]]] = {}

    def asked(mode: Mode) -> Answer:
        engine = place.get(mode.spec)
        if mode.spec.kind not in tokens_of:
            tokens_of[mode.spec.kind] = engine.call("tokenise", settings.prompts)
        if mode.adapters == (None,) and engine.loaded:
            # In vLLM's CPU kernels a request without an adapter gets the contribution of what is in the last slot.
            engine.unload_all()
        return engine.answer(tokens_of[mode.spec.kind], settings.tokens, mode.adapters)

    return asked


@pytest.fixture
def compared(
    benchmark: Any, ask: Ask, settings: Settings, versions: dict[str, str], results: Results
) -> Callable[..., Rounds[Answer, Answer]]:
    """Measure a mode in turn with another, and store what was measured. `before` and `after` are called around each
    turn of the other. `decode` returns the ratios of the speeds of decoding, if they are measured in another way."""

    def measured(
        mode: Mode,
        other: Mode,
        least: float | None = None,
        rank: int = 0,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        decode: Callable[[], list[float]] = list,
    ) -> Rounds[Answer, Answer]:
        def of_other() -> Answer:
            before()
            answer = ask(other)
            after()
            return answer

        rounds = take_turns(lambda: ask(mode), of_other, settings.rounds, timed_by(benchmark))
        require_tokens(rounds, settings)
        values = {of: rounds.ratios(rate, rate) for of, rate in SPEEDS.items()}
        values["decode"] = decode() or values["decode"]
        ratios = [Ratio(other.name, values[of], of, least if of == "decode" else None) for of in SPEEDS]
        facts = Measured(
            mode=mode.name,
            group=THROUGHPUT,
            model=settings.model,
            adapter=settings.adapter,
            rank=rank or settings.rank,
            batch=settings.batch,
            dtype=settings.dtype,
            versions=versions,
            rates=middle([run.rates for run in rounds.runs]),
            ratios=ratios,
        )
        results.add(benchmark, facts)
        return rounds

    return measured


def require_tokens(rounds: Rounds[Answer, Answer], settings: Settings) -> None:
    """Every request of every round got all its tokens, and each side answered the same in all rounds."""
    for answers in (rounds.runs, rounds.others):
        for answer in answers:
            assert [len(tokens) for tokens in answer.tokens] == [settings.tokens] * settings.batch
        assert len({answer.tokens for answer in answers}) == 1, "the same engine answered differently"


def require_effect(adapter: tuple[Any, ...], base: tuple[Any, ...]) -> None:
    assert adapter != base, "the adapter changed no token of these prompts: pass --prompts with prompts that it changes"


def require_applied(folder: Path, *adapters: str | None) -> None:
    """A recording has a healthy ledger of each adapter, and of no other."""
    trace = open_trace(folder)
    assert {load.path for load, _ in trace.loads} == set(adapters)
    for load, ledger in trace.loads:
        assert ledger.healthy, f"{load.path} did not take effect: {headline(ledger)}"
    assert not trace.request_findings


def require_turns(folder: Path, requests: int) -> None:
    """A recording has about half of the steps of these requests that count, and not all of them."""
    rows = open_trace(folder).rows
    assert rows is not None
    decoded = int((rows.phase == DECODE).sum())
    assert requests * STEPS // 2 <= decoded < requests * STEPS, f"{decoded} rows of {requests} requests were recorded"


Judge = Callable[[Mode], None]


@pytest.fixture
def judge(place: Engines, ask: Ask, tmp_path: Path) -> Judge:
    """Answer once more in an armed engine, recorded with norms, and require that the adapters have taken effect."""

    def judged(mode: Mode) -> None:
        engine = place.get(mode.spec)
        folder = tmp_path / f"judged-{len(list(tmp_path.iterdir()))}.lptrace"
        engine.unload_all()
        engine.call("begin", str(folder), "norms")
        ask(mode)
        engine.call("finish")
        engine.unload_all()
        require_applied(folder, *mode.adapters)

    return judged


class Switch:
    """Turns the recording of an armed engine on and off. Each turn has a trace of its own, and loads the adapter anew;
    what happens once for each load is over when the turn begins."""

    def __init__(self, engine: Engine, folder: Path, keep: str, adapter: str, settings: Settings) -> None:
        self.recorded: list[Path] = []
        self._engine, self._folder, self._keep, self._adapter = engine, folder, keep, adapter
        self._prompts = engine.call("tokenise", settings.prompts)
        self._rounds = settings.rounds
        self._on = False

    def __enter__(self) -> Switch:
        self._engine.unload_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.off()
        self._engine.unload_all()

    def on(self) -> None:
        self._engine.unload_all()
        self.recorded.append(self._folder / f"{len(self.recorded)}.lptrace")
        self._engine.call("begin", str(self.recorded[-1]), self._keep)
        self._engine.answer(self._prompts, 2, [self._adapter])
        self._on = True

    def off(self) -> None:
        if self._on:
            self._engine.call("finish")
            self._engine.unload_all()
        self._engine.answer(self._prompts, 2, [self._adapter])
        self._on = False

    def steps_in_turn(self) -> list[float]:
        """Ratios of single steps of decoding, recorded and not: much closer together than those of whole turns. They
        go into the recording that is on, which ends."""
        runs = [self._engine.steps_in_turn(self._prompts, [self._adapter]) for _ in range(self._rounds)]
        self.off()
        ratios = [ratio for run in runs for ratio in run]
        if ratios:
            require_turns(self.recorded[-1], len(self._prompts) * self._rounds)
        return ratios


@pytest.fixture(scope="module")
def plain(spec: EngineSpec) -> Mode:
    return Mode("no LoRA", replace(spec, lora=False, max_rank=0, max_loras=0), (None,))


@pytest.fixture(scope="module")
def adapted(spec: EngineSpec, settings: Settings) -> Mode:
    return Mode(WITH_ADAPTER, spec, (settings.adapter,))


@pytest.fixture(scope="module")
def idle(spec: EngineSpec, settings: Settings) -> Mode:
    return Mode("probe idle", replace(spec, probe="idle"), (settings.adapter,))


@pytest.fixture(scope="module")
def armed(spec: EngineSpec, settings: Settings) -> Mode:
    """At level `events`: the ledger of each load is judged, and no rows are recorded."""
    return Mode("probe armed at events", replace(spec, probe="armed"), (settings.adapter,))


def test_lora_on_but_not_requested(compared: Any, plain: Mode, spec: EngineSpec) -> None:
    rounds = compared(Mode("LoRA on, not requested", spec, (None,)), plain)
    assert rounds.runs[0].tokens == rounds.others[0].tokens


def test_with_the_adapter(compared: Any, plain: Mode, adapted: Mode) -> None:
    rounds = compared(adapted, plain)
    require_effect(rounds.runs[0].tokens, rounds.others[0].tokens)


def test_merged(compared: Any, adapted: Mode, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = merged_model(settings, tmp_path_factory.mktemp("merged"))
    assert parity(settings.adapter, model=settings.model, merged=folder, weights_only=True).verdict == "verified"
    spec = replace(adapted.spec, model=str(folder), lora=False, max_rank=0, max_loras=0)
    compared(Mode(MERGED, spec, (None,)), adapted)


def test_the_same_again(compared: Any, adapted: Mode) -> None:
    """Two starts of one engine: how far apart equal engines are on this machine."""
    again = replace(adapted, name="the same engine, started again", spec=replace(adapted.spec, start=1))
    rounds = compared(again, adapted)
    assert rounds.runs[0].tokens == rounds.others[0].tokens


def test_probe_idle(compared: Any, idle: Mode, adapted: Mode) -> None:
    """The plugin is installed and not asked to record: the cost for every server."""
    rounds = compared(idle, replace(adapted, name="no probe"))
    assert rounds.runs[0].tokens == rounds.others[0].tokens, "the probe changed tokens"


def test_armed_at_events(compared: Any, armed: Mode, idle: Mode, judge: Judge) -> None:
    rounds = compared(armed, idle)
    assert rounds.runs[0].tokens == rounds.others[0].tokens, "the probe changed tokens"
    judge(armed)


@pytest.mark.parametrize(("keep", "least"), [("norms", 0.97), ("shrink", 0.95), ("tensors", 0.88)])
def test_recording(
    compared: Any, armed: Mode, place: Engines, settings: Settings, tmp_path: Path, keep: str, least: float
) -> None:
    """In one engine, which records in every second turn."""
    with Switch(place.get(armed.spec), tmp_path, keep, settings.adapter, settings) as switch:
        mode, off = replace(armed, name=f"recording {keep}"), replace(armed, name="the same engine, idle")
        rounds = compared(mode, off, least, before=switch.off, after=switch.on, decode=switch.steps_in_turn)
    assert rounds.runs[0].tokens == rounds.others[0].tokens, "the probe changed tokens"
    for folder in switch.recorded:
        require_applied(folder, settings.adapter)
        trace = open_trace(folder)
        assert trace.rows is not None
        assert len(trace.rows) >= settings.batch * settings.tokens


def test_max_lora_rank(compared: Any, armed: Mode, judge: Judge, settings: Settings) -> None:
    allowed = max(size for size in MAX_RANKS if size <= FAR_ABOVE * settings.max_rank)
    if allowed == settings.max_rank:
        pytest.skip(f"vLLM has no --max-lora-rank above {allowed}")
    mode = replace(armed, name=f"--max-lora-rank {allowed}", spec=replace(armed.spec, max_rank=allowed))
    compared(mode, replace(armed, name=f"--max-lora-rank {settings.max_rank}"))
    judge(mode)


def test_max_loras(compared: Any, armed: Mode, judge: Judge) -> None:
    mode = replace(armed, name="--max-loras 4", spec=replace(armed.spec, max_loras=4))
    compared(mode, replace(armed, name="--max-loras 1"))
    judge(mode)


def test_two_adapters_in_one_batch(
    compared: Any, armed: Mode, judge: Judge, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In an engine with room for both; every second request is for the other adapter."""
    other = save_like(tmp_path_factory.mktemp("other"), settings.adapter, settings.rank)
    spec = replace(armed.spec, max_loras=4)
    alone = Mode("one adapter in the batch", spec, (settings.adapter,))
    both = Mode("two adapters in the batch", spec, (settings.adapter, str(other)))
    rounds = compared(both, alone)
    if settings.batch > 1:
        require_effect(rounds.runs[0].tokens[1::2], rounds.others[0].tokens[1::2])
    judge(both)


@pytest.mark.parametrize("rank", RANKS[1:])
def test_rank(
    compared: Any, armed: Mode, judge: Judge, settings: Settings, tmp_path_factory: pytest.TempPathFactory, rank: int
) -> None:
    """Made adapters on the same modules, each in an engine whose `--max-lora-rank` is its rank."""

    def of_rank(rank: int) -> Mode:
        folder = save_like(tmp_path_factory.mktemp(f"rank-{rank}"), settings.adapter, rank)
        return Mode(f"rank {rank}", replace(armed.spec, max_rank=rank), (str(folder),))

    mode, first = of_rank(rank), of_rank(RANKS[0])
    compared(mode, first, rank=rank)
    judge(mode)
    judge(first)


def test_peft(compared: Any, settings: Settings, ask: Ask) -> None:
    unmerged = EngineSpec("peft", settings.model, settings.dtype, settings.batch, adapter=settings.adapter)
    modes = Mode("PEFT, merged", replace(unmerged, merged=True), (None,)), Mode("PEFT, unmerged", unmerged, (None,))
    compared(*modes)
    base = ask(Mode("PEFT, base", replace(unmerged, adapter=""), (None,)))
    require_effect(ask(modes[1]).tokens, base.tokens)


def merged_model(settings: Settings, folder: Path) -> Path:
    """The base model with the adapter merged in by PEFT, saved in the dtype of the measurement."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    PeftModel.from_pretrained(model, settings.adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(folder)
    return folder
