"""A live server at each level: requests per second, the size of its folder, and the memory of its worker.

The levels take turns in one server (`lora-probe attach`), so that all of them meet the same machine. Requests for the
adapter and for the base model are mixed, and answered over HTTP.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Settings, Speeds

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server import Server, serving

pytestmark = pytest.mark.timeout(0)
"""10,000 requests to a model of 135 million parameters take half an hour on two cores."""
LEVELS = ("events", "norms", "shrink")
IN_A_ROUND = 128
"""Requests at each level before the next level has its turn: the speed of a shared machine changes within minutes."""
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


def test_a_server_under_load(
    benchmark: Any, speeds: Speeds, settings: Settings, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from lora_probe import open_trace
    from lora_probe.cli.attach import attach

    run = tmp_path / "run.lptrace"
    total = max(2, round(request.config.option.requests / (len(LEVELS) * IN_A_ROUND)))
    options = ("--dtype", settings.dtype, "--max-lora-rank", str(settings.max_rank), "--max-num-seqs", "16")
    environment = {"LORA_PROBE_TRACE": str(run), "LORA_PROBE_KEEP": "events", "LORA_PROBE_MAX_MB": str(MOST_MB)}
    rates: dict[str, list[float]] = {level: [] for level in LEVELS}
    memory: list[float] = []

    def rounds(server: Server) -> None:
        worker = open_trace(run).workers[0].process.pid
        for number in range(total):
            first = number % len(LEVELS)
            for level in (*LEVELS[first:], *LEVELS[:first]):
                attach(open_trace(run).workers, run, level)
                answered(server, 16, number)
                rates[level].append(answered(server, IN_A_ROUND, number))
            memory.append(resident(worker))

    # Two slots: in vLLM's CPU kernels, requests without an adapter get the contribution of what is in the last one.
    with serving(Path(settings.model), tmp_path / "server", *options, "--max-loras", "2", **environment) as server:
        assert server.load("bench", Path(settings.adapter)).ok
        answered(server, 64, 0)
        benchmark.pedantic(rounds, args=(server,), rounds=1, iterations=1)
        trace = open_trace(run)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
    for level, of_level in rates.items():
        name = f"server, {level}"
        speeds.measured[name] = statistics.median(of_level)
        if level != LEVELS[0]:
            speeds.against[name] = f"server, {LEVELS[0]}"
            speeds.rounds[name] = [speed / idle for speed, idle in zip(of_level, rates[LEVELS[0]], strict=True)]
    benchmark.extra_info.update(rates=rates, memory=memory, megabytes=size, dropped=trace.dropped.rows)
    after = ", ".join(f"{of_worker:.0f}" for of_worker in memory)
    print(f"folder {size:.0f} MB, {trace.dropped.rows} rows dropped; MiB of the worker after each round: {after}")
    # Records of loads and the segment that is being written come on top of the bound for rows.
    assert size < MOST_MB * 1.1 + 8
    assert all(ledger.healthy for _, ledger in trace.loads)
