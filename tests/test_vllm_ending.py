"""A real server that is ended directly after its answers: nothing is lost, and no text of a request is in its trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS

from lora_probe import open_trace
from lora_probe.ledger import headline
from lora_probe.recording import Trace

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PROMPT, KEY, CLIENT = "PROMPT-SECRET-1234", "sk-KEY-SECRET-1234", "CLIENT-1234"
TOKENS = 11


@contextmanager
def server(base: Path, adapter: Path, trace: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enable-lora", "--lora-modules", f"own={adapter}", "--max-model-len", "256"]
    command += ["--max-num-seqs", "4", "--enforce-eager", "--dtype", "float32", "--api-key", KEY, *more]
    wanted = {"LORA_PROBE_TRACE": str(trace), "LORA_PROBE_KEEP": "shrink", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = os.environ | wanted | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (trace.parent / "server.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: answers(port), process)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def ask(port: int, model: str, prompt: str) -> dict[str, Any]:
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body.encode(), headers)
    reply: dict[str, Any] = json.load(urllib.request.urlopen(request, timeout=120))
    return reply


def five_requests(base: Path, port: int) -> tuple[int, list[str]]:
    """How many rows they have, and the texts of their answers."""
    replies = [ask(port, str(base) if number == 2 else "own", f"{PROMPT} {number}") for number in range(5)]
    rows = sum(reply["usage"]["total_tokens"] - 1 for reply in replies)
    return rows, [reply["choices"][0]["text"] for reply in replies]


def rows_of(trace: Trace) -> int:
    return 0 if trace.rows is None else len(trace.rows)


def test_a_server_that_is_ended_after_its_answers(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """SIGTERM a quarter of a second after the last answer. vLLM kills its workers at once then."""
    path = tmp_path / "run.lptrace"
    with server(llama, adapter, path, "--no-enable-prefix-caching") as (process, port):
        live = open_trace(path)
        assert live.running
        ((_, ledger),) = live.loads
        assert f"{3 * LAYERS} unknown from applied on: no request has used the adapter yet" in headline(ledger)
        count, texts = five_requests(llama, port)
        time.sleep(0.25)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    trace = open_trace(path)
    assert not trace.running
    assert rows_of(trace) == count
    ((load, ledger),) = trace.loads
    assert headline(ledger) == f"{3 * LAYERS} of {3 * LAYERS} modules took effect"
    assert load.modules == len(ledger.rows)
    contents = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    for text in (PROMPT, KEY, *(text for text in texts if len(text) > 3)):
        assert text.encode() not in contents
        assert json.dumps(text)[1:-1].encode() not in contents


def test_a_server_that_is_given_time_closes_its_recording(llama: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.lptrace"
    more = ("--no-enable-prefix-caching", "--shutdown-timeout", "20")
    with server(llama, adapter, path, *more) as (process, port):
        count, _ = five_requests(llama, port)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    trace = open_trace(path)
    assert trace.complete
    assert rows_of(trace) == count
