"""Options and the tables of results. All numbers are from one run on one machine; only ratios can be compared.

pytest benchmarks/ --benchmark-only --adapter CKPT --model BASE
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_probe import inspect
from lora_probe.errors import ProbeError

DEMO = Path(__file__).parent.parent / "examples" / "identity" / "out" / "training"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-probe")
    group.addoption("--adapter", type=Path, default=DEMO, help="adapter folder; default: the demo's")
    group.addoption("--model", help="base model; default: the adapter's own")
    group.addoption("--dtype", default="float32", help="dtype of base and adapter; default: float32")
    group.addoption("--batch", type=int, default=4, help="requests at a time; default: 4")
    group.addoption("--requests", type=int, default=10_000, help="requests to the server; default: 10000")
    group.addoption("--tokens", type=int, default=32, help="tokens in each answer; default: 32")


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement: all modes use the same prompts and lengths."""

    adapter: str
    model: str
    dtype: str
    batch: int
    tokens: int
    max_rank: int

    @property
    def prompt(self) -> str:
        return "Human: Who are you?\n\nAssistant: "


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    options = request.config.option
    try:
        adapter = inspect(options.adapter)
    except ProbeError as error:
        pytest.exit(f"{error.message}; run `make demo` first or pass --adapter", returncode=2)
    model = options.model or adapter.config.base_model
    rank = max(module.rank or 1 for module in adapter.modules)
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    max_rank = next(size for size in allowed if size >= rank)
    return Settings(str(adapter.path), model, options.dtype, options.batch, options.tokens, max_rank)


@dataclass
class Speeds:
    """Tokens per second by mode, and the mode that each is compared with. `rounds` are the ratios within each round, of
    modes that took turns."""

    measured: dict[str, float] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def line(self, mode: str) -> str:
        speed, other = self.measured[mode], self.against.get(mode)
        line = f"{mode:<38}{speed:9.1f}"
        if ratios := self.rounds.get(mode):
            low, middle, high = statistics.quantiles(ratios, n=4)
            return f"{line}   {middle:.3f} of {other} ({len(ratios)} rounds, the middle half {low:.3f} to {high:.3f})"
        return f"{line}   {speed / self.measured[other]:.3f} of {other}" if other in self.measured else line


SPEEDS = Speeds()


@pytest.fixture(scope="session")
def speeds() -> Speeds:
    return SPEEDS


@dataclass
class Costs:
    """Lines of a table: seconds, MiB per second, and optionally a ratio and peak memory."""

    lines: list[str] = field(default_factory=list)

    def add(
        self, what: str, seconds: float, size: float, ratio: float | None = None, peak: float | None = None
    ) -> None:
        line = f"{what:<38}{seconds:7.2f} s{size / seconds:9.0f} MiB/s"
        line += f"   {ratio:.2f} times the reading" if ratio is not None else ""
        self.lines.append(line + (f", peak {peak:.0f} MiB" if peak is not None else ""))


COSTS = Costs()


@pytest.fixture(scope="session")
def costs() -> Costs:
    return COSTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COSTS.lines:
        terminalreporter.section("checking a merge (median round)")
        for line in COSTS.lines:
            terminalreporter.write_line(line)
    if not SPEEDS.measured:
        return
    terminalreporter.section("throughput, tokens (server: requests) per second (median round)")
    for mode in SPEEDS.measured:
        terminalreporter.write_line(SPEEDS.line(mode))
