"""Who got what in mixed batches of a real vLLM engine: contamination, half-filled slots, the prefix cache, preemption.

All tests share one engine with one slot, a prefix cache of 23 blocks and chunked prefill.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, call, edited, start_engine
from written import write_adapter

from lora_probe import open_trace
from lora_probe.comparison.totals import totals
from lora_probe.ledger import headline
from lora_probe.recording import DECODE, PREFILL, Trace
from lora_probe.recording.rows import NO_ADAPTER, NOT_IN_ITS_SLOT, places

pytestmark = pytest.mark.engine
MODULES = 3 * LAYERS
BLOCK, BLOCKS = 32, 24


class Server:
    """An engine that runs any mix of requests, one recording at a time."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.numbers = llm, itertools.count(1)

    def begin(self, folder: Path, keep: str = "norms") -> None:
        self.llm.collective_rpc("lora_probe_begin", args=(str(folder), keep))

    def finish(self, folder: Path) -> Trace:
        self.llm.collective_rpc("lora_probe_finish")
        return open_trace(folder)

    def adapter(self, name: str, path: Path, **more: Any) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, next(self.numbers), str(path), **more)

    def generate(self, prompts: list[list[int]], adapters: list[Any], tokens: int = 4) -> list[Any]:
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return self.llm.generate(inputs, parameters, use_tqdm=False, lora_request=adapters)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """For the whole run: vLLM ends what all engines of a process share when one of them is dropped."""
    first = tmp_path_factory.mktemp("server") / "first.lptrace"
    more = {"enable_prefix_caching": True, "block_size": BLOCK, "num_gpu_blocks_override": BLOCKS}
    # The probe's patches stay: another engine of this process may need them.
    return Server(start_engine(llama, first, **more, max_num_seqs=8, max_num_batched_tokens=128).llm)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def codes(trace: Trace) -> list[str]:
    return [finding.code for finding in trace.request_findings]


def test_a_contaminated_request_is_named_and_the_adapter_took_effect(
    server: Server, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.begin(tmp_path / "run")
    healthy = server.adapter("healthy", adapter)
    server.llm.llm_engine.add_lora(healthy)
    prompts = [prompt(length, seed) for seed, length in enumerate((7, 20, 9, 12))]
    server.generate(prompts, [None, healthy, None, healthy], tokens=8)
    trace = server.finish(tmp_path / "run")
    ((load, ledger),) = trace.loads
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    rows = trace.rows
    assert rows is not None
    got = (rows.load == NO_ADAPTER) & (rows.delta_norm > 0).any(axis=1)
    victims = {rows.requests[number] for number in rows.request[got]}
    (finding,) = trace.request_findings
    assert (finding.load, finding.code, finding.rows) == (load.load, "LP602", got.sum())
    assert set(finding.requests) == victims
    assert len(victims) == 2
    # 7 + 9 tokens of prompts and 7 + 7 fed back, all while the adapter's requests ran.
    assert finding.rows == 30
    status, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert status == 1
    assert "30 rows of 2 requests that did not ask for `healthy` got its contribution" in " ".join(out.split())
    assert not trace.healthy


def serve_half_filled(server: Server, path: Path) -> None:
    """vLLM raises when it fills the slot, and returns True when it is asked again."""
    bad = server.adapter("bad", path)
    with pytest.raises(Exception, match="must match"):
        server.llm.llm_engine.add_lora(bad)
    assert server.llm.llm_engine.add_lora(bad)
    server.generate([prompt(10, 1), prompt(5, 2)], [bad, bad])
    server.llm.llm_engine.remove_lora(bad.lora_int_id)


def test_a_half_filled_slot_is_not_the_base_model(server: Server, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    path = edited(adapter, tmp_path / "bad", lambda t: t | {name: np.tile(t[name], (2, 1))})
    server.begin(tmp_path / "run", "shrink")
    serve_half_filled(server, path)
    trace = server.finish(tmp_path / "run")
    ((_, ledger),) = trace.loads
    assert ledger.refused
    (finding,) = trace.request_findings
    assert (finding.code, finding.rows, len(finding.requests)) == ("LP606", 10 + 5 + 2 * 3, 2)
    # Without a layer that is recorded, there are no rows; with one, they are not those of the base model.
    good = server.adapter("good", adapter)
    server.begin(tmp_path / "two", "shrink")
    server.generate([prompt(10, 1)], [good])
    serve_half_filled(server, path)
    # What the hint advises: the fixed adapter, under a new id.
    server.generate([prompt(10, 1)], [server.adapter("bad", adapter)])
    trace = server.finish(tmp_path / "two")
    rows = trace.rows
    assert rows is not None
    stale = rows.load == NOT_IN_ITS_SLOT
    assert stale.sum() == 10 + 5 + 2 * 3
    assert (rows.delta_norm[stale, 0] > 0).all()
    (finding,) = trace.request_findings
    assert (trace.loads[finding.load][0].name, finding.code, finding.rows) == ("bad", "LP606", stale.sum())
    assert set(finding.requests) == {rows.requests[number] for number in rows.request[stale]}
    assert headline(trace.loads[0][1]) == f"{MODULES} of {MODULES} modules took effect"


def test_a_stale_table_from_tokens_to_slots(
    server: Server, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter has a slot, and the engine's table names none for its rows."""
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    original = PunicaWrapperBase.update_metadata

    def outdated(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._token_lora_indices.fill_(-1)

    server.begin(tmp_path / "run")
    monkeypatch.setattr(PunicaWrapperBase, "update_metadata", outdated)
    server.generate([prompt(6, 9)], [server.adapter("stale", adapter)])
    trace = server.finish(tmp_path / "run")
    rows = trace.rows
    assert rows is not None
    assert (rows.load == NOT_IN_ITS_SLOT).all()
    assert [(finding.code, finding.rows) for finding in trace.request_findings] == [("LP606", 9)]
    ((_, ledger),) = trace.loads
    assert {row.stations["applied"].code for row in ledger.rows} == {"LP601"}


def test_positions_from_the_prefix_cache_are_marked(server: Server, adapter: Path, tmp_path: Path) -> None:
    server.begin(tmp_path / "run")
    healthy = server.adapter("cached", adapter)
    long = prompt(80, 3)
    server.generate([long], [healthy])
    server.generate([long], [healthy])
    server.generate([long], [None])
    server.generate([long], [None])
    trace = server.finish(tmp_path / "run")
    rows = trace.rows
    assert rows is not None
    assert codes(trace) == []
    served = [rows.served[name] for name in rows.requests]
    assert [one.prompt for one in served] == [80] * 4
    assert [one.cached for one in served] == [0, 64, 0, 64]
    assert [one.cached_loads for one in served] == [[], [0], [], [-1]]
    assert [one.preemptions for one in served] == [0] * 4
    for number, one in enumerate(served):
        positions = rows.position[rows.request == number]
        assert sorted(positions.tolist()) == list(range(one.cached, 83))


def test_blocks_of_other_weights_under_the_same_name(
    server: Server, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    """And what the hint advises cures."""
    other = write_adapter(tmp_path / "other", llama, seed=7)
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)
    long = prompt(100, 4)
    server.begin(tmp_path / "run")
    server.generate([long], [server.adapter("same", path)])
    shutil.copytree(other, path, dirs_exist_ok=True)
    server.generate([long], [server.adapter("same", path)])
    server.generate([long], [server.adapter("another", path)])
    trace = server.finish(tmp_path / "run")
    rows = trace.rows
    assert rows is not None
    (finding,) = trace.request_findings
    assert (finding.load, finding.code, finding.rows) == (1, "LP607", 96)
    assert finding.requests == [rows.requests[1]]
    assert [(one.cached, one.cached_loads) for one in rows.served.values()] == [(0, []), (96, [0]), (0, [])]
    # The same weights again are not other weights.
    server.begin(tmp_path / "two")
    server.generate([long], [server.adapter("again", path)])
    server.generate([long], [server.adapter("again", path)])
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    server.llm.reset_prefix_cache()
    server.generate([long], [server.adapter("again", path)])
    trace = server.finish(tmp_path / "two")
    assert codes(trace) == []
    assert trace.rows is not None
    assert [one.cached for one in trace.rows.served.values()] == [0, 96, 0]


def test_an_adapter_that_is_replaced_in_place(server: Server, llama: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)
    long = prompt(70, 5)
    server.begin(tmp_path / "run")
    request = server.adapter("inplace", path)
    server.generate([long], [request])
    shutil.copytree(write_adapter(tmp_path / "other", llama, seed=8), path, dirs_exist_ok=True)
    from vllm.lora.request import LoRARequest

    server.llm.llm_engine.add_lora(LoRARequest("inplace", request.lora_int_id, str(path), load_inplace=True))
    server.generate([long], [request])
    trace = server.finish(tmp_path / "run")
    assert [(finding.code, finding.rows) for finding in trace.request_findings] == [("LP607", 64)]


def test_rows_that_were_computed_again_count_once(server: Server, adapter: Path, tmp_path: Path) -> None:
    server.begin(tmp_path / "run")
    healthy = server.adapter("preempted", adapter)
    # Each takes a block more in the end; the oldest does so last, and the youngest has to give it one.
    lengths = [194, 200, 206, 212]
    server.generate([prompt(length, 100 + length) for length in lengths], [healthy] * 4, tokens=36)
    trace = server.finish(tmp_path / "run")
    rows = trace.rows
    assert rows is not None
    assert sum(one.preemptions for one in rows.served.values()) > 0
    last = places(rows)
    assert len(last) < len(rows)
    counted = np.zeros(len(rows), np.bool_)
    counted[list(last.values())] = True
    assert sorted(one.prompt for one in rows.served.values()) == sorted(lengths)
    for number, name in enumerate(rows.requests):
        mine = counted & (rows.request == number)
        length = rows.served[name].prompt
        assert sorted(rows.position[mine].tolist()) == list(range(length + 35))
        assert set(rows.phase[mine & (rows.position < length)].tolist()) == {PREFILL}
        assert set(rows.phase[mine & (rows.position >= length)].tolist()) == {DECODE}
    assert {load: counted for load, counted in totals(trace, [0]).rows.items() if load == 0} == {0: len(last)}
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    assert codes(trace) == []


def test_two_requests_with_one_id_are_two(server: Server, adapter: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams

    server.begin(tmp_path / "run")
    healthy = server.adapter("twice", adapter)
    engine = server.llm.llm_engine
    for length, request in ((6, healthy), (9, None)):
        tokens = {"prompt_token_ids": prompt(length, length)}
        engine.add_request(
            "cmpl-dup", tokens, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), lora_request=request
        )
    while engine.has_unfinished_requests():
        engine.step()
    rows = server.finish(tmp_path / "run").rows
    assert rows is not None
    assert len(rows.requests) == 2
    assert all(name.startswith("cmpl-dup-") for name in rows.requests)
    positions = {rows.served[name].prompt: (rows.request == n).sum() for n, name in enumerate(rows.requests)}
    assert positions == {6: 7, 9: 10}
