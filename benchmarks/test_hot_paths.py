"""Commands that people wait for, as ratios to the least that they could do, and to what else one would take.

    pytest benchmarks/test_hot_paths.py --benchmark-only --peers PATH/TO/VENV

Every command runs as a whole process on made files of realistic size, in turn with its limit (`limits.py`). What it
prints is checked: a benchmark of a wrong answer fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import made
import pytest
from limits import read, write
from processes import PROBE, Limit, Ran, Stopwatch, of_json, peer, reading, store
from rounds import take_turns, timed_by

from lora_probe import open_trace
from lora_probe.recording import TraceWriter
from lora_probe.recording.benchmarks import Ratio

pytestmark = pytest.mark.timeout(0)

IMPORTS = Limit("import numpy, rich", (sys.executable, "-c", "import numpy, rich"))
MODULES_OF_7B = 32 * 7
ROWS = 100_000
FOLDERS = 1000


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="session")
def of_7b(files: Path) -> Path:
    return made.save_adapter(files / "7b", made.OF_7B, 64)


@pytest.fixture(scope="session")
def moved(files: Path) -> Path:
    """The same adapter after more training: 2 % of noise in A and B."""
    return made.save_adapter(files / "moved", made.OF_7B, 64, noise=0.02)


@pytest.fixture(scope="session")
def traces(files: Path) -> tuple[Path, Path]:
    """Two runs of 100,000 rows with norms of 84 modules, 134 MB each."""
    first, second = (made.save_trace(files / f"{seed}.lptrace", ROWS, seed=seed) for seed in (0, 1))
    return first, second


def says(*texts: str) -> Callable[[str], object]:
    """A check that all of these texts were printed."""

    def check(printed: str) -> None:
        for text in texts:
            assert text in printed, printed[:2000]

    return check


def test_help(stopwatch: Stopwatch) -> None:
    stopwatch.against("lora-probe --help", (PROBE, "--help"), IMPORTS, says("inspect", "parity"), most=1.5)


def test_inspect(stopwatch: Stopwatch, of_7b: Path) -> None:
    stopwatch.against("inspect, 7B r 64", (PROBE, "inspect", of_7b), IMPORTS, says("224 modules"), most=1.5)


def test_inspect_header_of_70b(stopwatch: Stopwatch, files: Path) -> None:
    adapter = made.sparse_adapter(files / "70b", made.OF_70B, 64)
    stopwatch.against("inspect, 70B r 64", (PROBE, "inspect", adapter), IMPORTS, says("560 modules"))


def test_inspect_norms(stopwatch: Stopwatch, of_7b: Path, request: pytest.FixtureRequest) -> None:
    command = (PROBE, "inspect", of_7b, "--norms", "--format", "json")
    peers = peer(request.config.option.peers, "adaptersentry", "scan", of_7b / made.WEIGHTS)
    limit = reading("widen", "read and widen", of_7b)
    stopwatch.against(
        "inspect --norms, 7B r 64", command, limit, has_norms(MODULES_OF_7B), most=2, peers=peers, least_of_peer=6
    )


def has_norms(count: int) -> Callable[[str], object]:
    def check(printed: str) -> None:
        modules = of_json(printed)["modules"]
        assert len(modules) == count
        assert all(module["norm"] > 0 for module in modules)

    return check


def test_inspect_two(stopwatch: Stopwatch, of_7b: Path, moved: Path) -> None:
    limit = reading("widen", "read and widen both", of_7b, moved)
    command = (PROBE, "inspect", of_7b, moved)
    stopwatch.against("inspect A B, 7B r 64", command, limit, says("moved"), status=1)


def test_check(stopwatch: Stopwatch, of_7b: Path) -> None:
    command = (PROBE, "check", of_7b, "--exit-zero")
    stopwatch.against("check, 7B r 64", command, reading("widen", "read and widen", of_7b), says("224 modules read"))


def test_check_a_thousand(stopwatch: Stopwatch, files: Path) -> None:
    """SmolLM2-135M's shapes, rank 8 on q, k and v: 90 modules each."""
    folders = made.many_adapters(files / "many", FOLDERS)
    limit = reading("widen", "read and widen all", folders)
    command = (PROBE, "check", folders, "--recursive", "--exit-zero", "--format", "json")

    def check(printed: str) -> None:
        summary = of_json(printed)["summary"]
        assert (summary["adapters"], summary["not_judged"]) == (FOLDERS, 0)

    stopwatch.rounds = min(stopwatch.rounds, 2)
    stopwatch.against(f"check --recursive, {FOLDERS:,} adapters", command, limit, check)


def test_html_of_a_thousand_modules(stopwatch: Stopwatch, files: Path) -> None:
    shape = made.Shape(layers=143, hidden=1024, inner=2816, keys=256, vocabulary=32000)
    adapter = made.save_adapter(files / "thousand", shape, 8)
    command = (PROBE, "inspect", adapter, "--norms", "--format", "html")
    limit = reading("widen", "read and widen", adapter)
    stopwatch.against("inspect --norms --format html, 1,001 modules", command, limit, says("1001 modules", "</html>"))


def test_show(stopwatch: Stopwatch, traces: tuple[Path, Path]) -> None:
    limit = reading("read", "read the trace", traces[0])
    command = (PROBE, "show", traces[0])
    stopwatch.against(f"show, {ROWS:,} rows", command, limit, says("84 of 84 modules took effect"))


def test_compare(stopwatch: Stopwatch, traces: tuple[Path, Path]) -> None:
    limit = reading("read", "read both traces", *traces)
    command = (PROBE, "compare", *traces, "--format", "json")

    def check(printed: str) -> None:
        assert of_json(printed)["rows"] == ROWS

    stopwatch.against(f"compare, 2 x {ROWS:,} rows", command, limit, check, status=1)


def test_reading_a_trace(stopwatch: Stopwatch, traces: tuple[Path, Path]) -> None:
    """All rows joined in this process."""

    def joined() -> None:
        rows = open_trace(traces[0]).rows
        assert rows is not None
        assert len(rows) == ROWS

    names = [str(path) for path in sorted(traces[0].rglob("*.safetensors"))]
    limit = "read the trace", lambda: [read(name) for name in names]
    in_turn(stopwatch, f"open_trace().rows, {ROWS:,} rows", lambda: timed(joined), limit)


def test_writing_a_trace(stopwatch: Stopwatch, tmp_path: Path) -> None:
    """Rows of 64 a step, as an engine hands them over; the limit writes as many bytes into one file."""
    count = ROWS // 4
    steps = list(made.steps(count))
    size = sum(rows.nbytes for rows in steps)

    def written() -> Ran:
        folder = tmp_path / f"{time.perf_counter_ns()}.lptrace"

        def record() -> None:
            with TraceWriter(folder / "vllm", made.PROCESS) as writer:
                for rows in steps:
                    writer.rows(rows)

        ran = timed(record)
        assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) >= size
        return ran

    limit = "write the bytes", lambda: write(size, str(tmp_path / "plain"))
    in_turn(stopwatch, f"writing a trace, {count:,} rows", written, limit)


def in_turn(stopwatch: Stopwatch, mode: str, work: Callable[[], Ran], limit: tuple[str, Callable[[], object]]) -> None:
    """Time work in this process in turn with its limit."""
    name, raw = limit
    rounds = take_turns(work, lambda: timed(raw), stopwatch.rounds, timed_by(stopwatch.benchmark))
    ratios = [Ratio(name, rounds.ratios(lambda ran: ran.seconds, lambda ran: ran.seconds), "time")]
    store(stopwatch.benchmark, stopwatch.results, mode, rounds.runs, ratios, stopwatch.versions)


def timed(work: Callable[[], object]) -> Ran:
    started = time.perf_counter()
    work()
    return Ran(time.perf_counter() - started, 0, "")
