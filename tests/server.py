"""A real vLLM server with LoRA on the CPU, for tests of what operators see.

In: a base model, a folder for its log, options of `vllm serve` and environment variables. Out: a `Server` that answers
over HTTP, until the `with` block ends. It runs in a session of its own, and no process of it outlives the block.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

STARTS_WITHIN, ANSWERS_WITHIN, ENDS_WITHIN = 240, 120, 30
"""Seconds. A start takes 30 on an idle machine with two cores."""
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "256", "--max-num-seqs", "4"),
    *("--enable-lora", "--max-lora-rank", "16", "--enforce-eager"),
)
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: its status, and its body as JSON, or as text if it is not JSON."""

    status: int
    body: Any

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def error(self) -> str:
        """The message of vLLM's error."""
        return str(self.body["error"]["message"])

    @property
    def text(self) -> str:
        """The completion of the first choice."""
        return str(self.body["choices"][0]["text"])


@dataclass(frozen=True)
class Server:
    """A running server. `base` is the name under which it serves the base model."""

    base: str
    port: int
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        """The API server, which is the parent of the engine's processes."""
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> Answer:
        return _answer(Request(self._url(path)))

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> Answer:
        data = json.dumps(body).encode()
        return _answer(Request(self._url(path), data, {"Content-Type": "application/json", **headers}))

    def complete(self, prompt: str | list[int], adapter: str | None = None, max_tokens: int = 4, **more: Any) -> Answer:
        """Greedy, and past the end of the answer; `more` are fields of the request, `logprobs=1`."""
        body = {"model": adapter or self.base, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.post("/v1/completions", body | {"ignore_eos": True} | more)

    def load(self, name: str, path: Path, **more: Any) -> Answer:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)} | more)

    def unload(self, name: str) -> Answer:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def metrics(self) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
        """The samples of GET /metrics by their names and labels."""
        from prometheus_client.parser import text_string_to_metric_families

        samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(str(self.get("/metrics").body)):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return samples

    def at_once(self, calls: Sequence[Callable[[], T]], threads: int = 16) -> list[T]:
        """The results of calls that run concurrently, in their order."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda call: call(), calls))

    def terminate(self) -> int:
        """SIGTERM to the API server, as an operator or Kubernetes sends it. Returns its exit status."""
        self.process.terminate()
        return self.process.wait(ENDS_WITHIN)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(ENDS_WITHIN)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def serving(base: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Start a server and wait until it is healthy. `options` follow OPTIONS; the last of two counts."""
    folder.mkdir(parents=True, exist_ok=True)
    with started(base, folder, *options, **environment) as server:
        deadline = time.monotonic() + STARTS_WITHIN
        while not _healthy(server):
            status = server.process.poll()
            assert status is None, f"the server ended with status {status}:\n{server.log[-6000:]}"
            assert time.monotonic() < deadline, f"the server did not start:\n{server.log[-6000:]}"
            time.sleep(0.1)
        yield server


@contextmanager
def started(base: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Start a server and do not wait: for servers that do not become healthy."""
    port, log = _free_port(), folder / "server.log"
    # `vllm serve` needs a distribution that is called vllm; the one of the CPU build is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "base", *OPTIONS, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server("base", port, process, log)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDS_WITHIN)
        server.kill()


def _healthy(server: Server) -> bool:
    try:
        return server.get("/health").ok
    except OSError:
        return False


def _answer(request: Request) -> Answer:
    try:
        with urlopen(request, timeout=ANSWERS_WITHIN) as response:
            status, data = response.status, response.read()
    except HTTPError as error:
        status, data = error.code, error.read()
    text = data.decode()
    try:
        return Answer(status, json.loads(text))
    except ValueError:
        return Answer(status, text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
