"""A live server at each level: requests per second, the size of its folder, and the memory of its worker.

The levels take turns in one server (`lora-probe attach`), so that all of them meet the same machine. Requests for the
adapter and for the base model are mixed, and answered over HTTP.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Settings
from rounds import Results, take_turns, timed_by

from lora_probe.recording.benchmarks import THROUGHPUT, Measured, Ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server import Server, serving

pytestmark = pytest.mark.timeout(0)
"""10,000 requests to a model of 135 million parameters take half an hour on two cores."""
IDLE = "events"
IN_A_ROUND = 128
"""Requests at one level before the other has its turn: the speed of a shared machine changes within minutes."""
MOST_MB = 64


def resident(pid: int) -> float:
    """MiB in memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def answered(server: Server, count: int, seed: int) -> float:
    """Requests per second of `count` requests, 16 at a time; every third is for the base model."""
    prompts = [[(7 * seed + 3 * number + token) % 250 for token in range(8 + number % 24)] for number in range(count)]
    calls = [
        lambda prompt=prompt, adapter=None if number % 3 == 2 else "bench": server.complete(prompt, adapter, 8)
        for number, prompt in enumerate(prompts)
    ]
    began = time.monotonic()
    answers = server.at_once(calls)
    seconds = time.monotonic() - began
    assert all(answer.ok for answer in answers)
    return count / seconds


@pytest.mark.parametrize("level", ["norms", "shrink"])
def test_a_server_under_load(
    benchmark: Any,
    results: Results,
    settings: Settings,
    versions: dict[str, str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    level: str,
) -> None:
    from lora_probe import open_trace
    from lora_probe.cli.attach import attach

    run = tmp_path / "run.lptrace"
    options = ("--dtype", settings.dtype, "--max-lora-rank", str(settings.max_rank), "--max-num-seqs", "16")
    environment = {"LORA_PROBE_TRACE": str(run), "LORA_PROBE_KEEP": IDLE, "LORA_PROBE_MAX_MB": str(MOST_MB)}
    seeds = itertools.count()
    memory: list[float] = []

    def at(server: Server, level: str) -> float:
        workers = open_trace(run).workers
        attach(workers, run, level)
        answered(server, 16, next(seeds))
        memory.append(resident(workers[0].process.pid))
        return answered(server, IN_A_ROUND, next(seeds))

    # Two slots: in vLLM's CPU kernels, requests without an adapter get the contribution of what is in the last one.
    with serving(Path(settings.model), tmp_path / "server", *options, "--max-loras", "2", **environment) as server:
        assert server.load("bench", Path(settings.adapter)).ok
        answered(server, 64, next(seeds))
        count = max(2, round(request.config.option.requests / (4 * IN_A_ROUND)))
        rounds = take_turns(lambda: at(server, level), lambda: at(server, IDLE), count, timed_by(benchmark))
        trace = open_trace(run)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
    rates = {
        "requests_per_second": statistics.median(rounds.runs),
        "folder_megabytes": size,
        "worker_mib_first": memory[0],
        "worker_mib_last": memory[-1],
        "dropped_rows": trace.dropped.rows,
    }
    facts = Measured(
        mode=f"live server, {level}",
        group=THROUGHPUT,
        model=settings.model,
        adapter=settings.adapter,
        rank=settings.rank,
        batch=16,
        dtype=settings.dtype,
        versions=versions,
        rates=rates,
        ratios=[Ratio(f"live server, {IDLE}", rounds.ratios(float, float))],
    )
    results.add(benchmark, facts)
    # Records of loads and the segment that is being written come on top of the bound for rows.
    assert size < MOST_MB * 1.1 + 8
    assert all(ledger.healthy for _, ledger in trace.loads)
