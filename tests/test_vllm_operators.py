"""What operators of a vLLM server see and do: metrics, strict mode, `attach`. One real server for all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from conftest import LAYERS, call
from failures import FAILURES
from server import Server, serving, started
from written import edited, write_adapter

from lora_probe import open_trace

T = TypeVar("T")

pytestmark = pytest.mark.engine
MODULES = 3 * LAYERS
ARMED = {"LORA_PROBE_KEEP": "events", "LORA_PROBE_METRICS": "1", "LORA_PROBE_STRICT": "1"}
FAULT = """
from pathlib import Path

def register():
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA as Layer
    if hasattr(Layer, "set_lora_without_fault"):
        return
    Layer.set_lora_without_fault = Layer.set_lora

    def set_lora(self, index, *args, **kwargs):
        self.set_lora_without_fault(index, *args, **kwargs)
        if self.base_layer.prefix.split(".")[2] == "1" and Path(__file__).with_name("now").exists():
            self.reset_lora(index)

    Layer.set_lora = set_lora
"""
CONTAMINATED = "lora_probe_contaminated_rows_total"
PROMPTS = ("Who are you?", "What is the capital of France?", "Say something long and then some more.")


@pytest.fixture(scope="module")
def dead(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every name has a prefix that vLLM does not know: it accepts the adapter and serves the base model."""
    return FAILURES["C01-text-names"].make(adapter, llama, tmp_path_factory.mktemp("dead") / "dead")


@pytest.fixture(scope="module")
def oversized(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM itself fails while it fills the slot, after it has registered the adapter."""
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    folder = tmp_path_factory.mktemp("oversized") / "oversized"
    return edited(adapter, folder, lambda tensors: tensors | {name: np.tile(tensors[name], (2, 1))})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operators") / "run.lptrace"


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another plugin of vLLM, in a folder for PYTHONPATH: while a file `now` is in that folder, slots of layer 1 are
    emptied after they were filled."""
    folder = tmp_path_factory.mktemp("fault")
    (folder / "fault-0.dist-info").mkdir()
    (folder / "fault-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fault\nVersion: 0\n")
    (folder / "fault-0.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\nfault = fault:register\n")
    (folder / "fault.py").write_text(FAULT)
    return folder


@pytest.fixture(scope="module")
def server(llama: Path, run: Path, fault: Path) -> Iterator[Server]:
    """Armed, strict, with metrics; one slot and one adapter in its cache, so that each load evicts the one before."""
    options = ("--max-loras", "1", "--max-cpu-loras", "1")
    with serving(llama, run.parent, *options, PYTHONPATH=str(fault), LORA_PROBE_TRACE=str(run), **ARMED) as server:
        yield server


def modules(server: Server, adapter: str) -> tuple[int, dict[str, int]]:
    """`lora_probe_modules` of an adapter: its only generation, and its modules by state without the empty ones."""
    samples = [(dict(labels), int(value)) for labels, value in server.metrics()["lora_probe_modules"].items()]
    own = [(labels, value) for labels, value in samples if labels["adapter"] == adapter and labels["rank"] == "0"]
    (generation,) = {labels["generation"] for labels, _ in own}
    assert {labels["state"] for labels, _ in own} == {"took_effect", "lost", "wrong", "unknown"}
    return int(generation), {labels["state"]: value for labels, value in own if value}


def rows_of(server: Server, name: str, adapter: str) -> float:
    return server.metrics().get(name, {}).get(frozenset({("adapter", adapter), ("engine", "0"), ("rank", "0")}), 0.0)


def segments(run: Path) -> list[Path]:
    return sorted((run / "vllm-rank-0").rglob("[0-9]*.safetensors"))


def eventually(observe: Callable[[], T], expected: Callable[[T], bool] = bool, seconds: float = 20) -> T:
    """What `observe` returns once it is as expected: metrics and rows follow within seconds."""
    deadline = time.monotonic() + seconds
    while not expected(value := observe()):
        assert time.monotonic() < deadline, value
        time.sleep(0.2)
    return value


def test_strict_refuses_what_vllm_would_serve_as_the_base_model(server: Server, dead: Path, adapter: Path) -> None:
    assert "lora_probe_modules" not in server.metrics()
    for _ in range(2):
        answer = server.load("dead", dead)
        assert answer.status == 500
        assert f"0 of {MODULES} modules take effect, {MODULES} lost at read" in answer.error
        assert "(LP501)" in answer.error
        assert server.complete("hi", "dead").status == 404
    assert server.complete("hi").ok
    assert server.load("healthy", adapter).ok
    assert server.complete("hi", "healthy").ok


def test_a_refused_reload_leaves_the_old_adapter(server: Server, dead: Path, adapter: Path) -> None:
    before = server.complete("hi", "healthy", max_tokens=8, logprobs=1).body["choices"][0]["logprobs"]
    assert "(LP501)" in server.load("healthy", dead, load_inplace=True).error
    after = server.complete("hi", "healthy", max_tokens=8, logprobs=1).body["choices"][0]["logprobs"]
    assert before == after
    # Its modules are still counted, and not those of the refused one.
    assert modules(server, "healthy") == (0, {"unknown": MODULES})


def test_strict_leaves_nothing_of_an_adapter_that_vllm_fails_to_place(server: Server, oversized: Path) -> None:
    for _ in range(2):
        answer = server.load("oversized", oversized)
        assert answer.status == 500
        assert "must match" in answer.error
        assert server.complete("hi", "oversized").status == 404
    assert server.complete("hi", "healthy").ok


def test_strict_refuses_what_is_wrong_in_the_slot(server: Server, fault: Path, adapter: Path) -> None:
    """Only the values in the slot show it; by then the adapter is registered."""
    (fault / "now").touch()
    for _ in range(2):
        answer = server.load("emptied", adapter)
        assert (answer.status, "lost at placed" in answer.error, "(LP505)" in answer.error) == (500, True, True)
        assert server.complete("hi", "emptied").status == 404
    (fault / "now").unlink()
    assert server.load("emptied", adapter).ok
    assert server.complete("hi", "healthy").ok


def test_attach_raises_and_lowers_the_level(server: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = run / "vllm-rank-0" / "process.json"
    assert server.complete("hi", "healthy").ok
    assert segments(run) == []
    status, out, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert (status, out) == (0, "vllm-rank-0 records norms from the next step on (until now: events)\n"), err
    assert json.loads(process.read_text())["keep"] == "norms"
    assert server.complete(PROMPTS[0], "healthy", max_tokens=8).ok
    eventually(lambda: segments(run))
    # `applied` and `agrees` of a load that has been in its slot for a while.
    eventually(lambda: modules(server, "healthy")[1], lambda states: states == {"took_effect": MODULES})
    ledgers = [ledger for load, ledger in open_trace(run).loads if load.name == "healthy"]
    ledger = [ledger for ledger in ledgers if not ledger.refused][-1]
    assert ledger.healthy
    assert {row.stations["agrees"].value for row in ledger.rows} == {"ok"}


def test_rows_of_others_are_counted(server: Server, run: Path) -> None:
    """vLLM 0.32's CPU kernels add the only slot to all rows of a mixed batch."""
    calls = [lambda n=n, p=p: server.complete(p, n, max_tokens=16) for p in PROMPTS for n in ("healthy", None)]
    assert all(answer.ok for answer in server.at_once(calls))
    written = eventually(
        lambda: (contaminated(run), rows_of(server, CONTAMINATED, "healthy")), lambda n: 0 < n[0] == n[1]
    )
    assert rows_of(server, CONTAMINATED, "healthy") == written[0]
    assert rows_of(server, "lora_probe_stale_rows_total", "healthy") == 0


def contaminated(run: Path) -> int:
    """Rows without an adapter that got a contribution, counted in the trace."""
    rows = open_trace(run).rows
    assert rows is not None
    return int(((rows.load < 0) & (np.nan_to_num(rows.delta_norm) > 0).any(axis=1)).sum())


def test_inside_a_step_nothing_is_refused(server: Server, run: Path, llama: Path, tmp_path: Path) -> None:
    """An adapter that was evicted and whose file has changed since is read again inside a step."""
    folder = write_adapter(tmp_path / "changing", llama)
    assert server.load("changing", folder).ok
    assert server.load("other", write_adapter(tmp_path / "other", llama, seed=5)).ok
    half = edited(folder, tmp_path / "half", lambda t: {name.replace("layers.1.", "layers.9."): t[name] for name in t})
    for file in half.iterdir():
        file.replace(folder / file.name)
    assert server.complete("hi", "changing", max_tokens=8).ok
    # Three pairs without a home, and the three modules that have no pair.
    states = {"lost": 6, "took_effect": MODULES - 3}
    eventually(lambda: modules(server, "changing"), lambda seen: seen == (1, states))
    assert "served although LORA_PROBE_STRICT=1, because it was read inside a step" in server.log
    (event,) = [event for event in open_trace(run).events if event.stage == "strict"]
    assert "3 lost at read" in event.text
    assert server.complete("hi").ok


def test_after_lowering_nothing_is_recorded(server: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call("attach", run, "--keep", "events", "--format", "json", capsys=capsys)
    assert status == 0, err
    assert json.loads(out)["workers"] == [{"name": "vllm-rank-0", "before": "norms", "not_recorded": None}]
    assert server.complete("hi", "other").ok
    eventually(lambda: levels(run)[-1], lambda text: text == "recording events: 0 modules of 1 loads")
    before = segments(run)
    assert server.complete(PROMPTS[1], "other", max_tokens=32).ok
    time.sleep(6)
    assert segments(run) == before
    assert call("attach", run, "--keep", "shrink", capsys=capsys)[0] == 0
    assert server.complete(PROMPTS[1], "other", max_tokens=8).ok
    eventually(lambda: len(segments(run)) > len(before))


def levels(run: Path) -> list[str]:
    return [event.text for event in open_trace(run).events if event.stage == "attach" and event.facts]


def test_nobody_answers_after_the_end(server: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.terminate()
    eventually(lambda: call("attach", run, "--keep", "norms", capsys=capsys)[0] == 2)
    _, out, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert out == ""
    assert "is closed" in err or "does not run on this machine any more" in err
    # vLLM itself logs every load that fails with a traceback.
    assert "the probe failed" not in server.log
    assert "lora-probe cannot" not in server.log


def test_an_adapter_of_the_command_line_ends_the_start(llama: Path, dead: Path, tmp_path: Path) -> None:
    trace = str(tmp_path / "run.lptrace")
    with started(llama, tmp_path, "--lora-modules", f"dead={dead}", LORA_PROBE_TRACE=trace, LORA_PROBE_STRICT="1") as s:
        assert s.process.wait(240) != 0
        assert "lora-probe refuses the adapter `dead`" in s.log
        assert "(LP501)" in s.log
