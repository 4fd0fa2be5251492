"""`show BENCH.json`: ratios with their spread, targets, files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from saved_benchmarks import process, save_benchmark, speed
from served import A, B, mixed

from lora_probe.errors import UnreadableFile
from lora_probe.recording.benchmarks import Ratio, open_benchmarks


def test_the_range_of_a_median_contains_the_true_one() -> None:
    """In 95 of 100 cases, for six rounds and more."""
    random = np.random.default_rng(0)
    for rounds in (6, 9, 15, 30):
        inside = 0
        for _ in range(1000):
            ratio = Ratio("other", (1 + 0.05 * random.standard_normal(rounds)).tolist())
            inside += ratio.low <= 1 <= ratio.high
        assert inside >= 930, rounds


def test_a_difference_below_the_noise_is_called_that() -> None:
    assert Ratio("other", [0.98, 1.03, 1.01]).noise
    assert not Ratio("other", [0.9, 0.92, 0.91]).noise


@pytest.mark.parametrize(
    ("values", "bounds", "missed"),
    [
        ([0.98, 0.99, 0.97], {"least": 0.97}, False),
        ([0.90, 0.91, 0.92], {"least": 0.97}, True),
        # It cannot be told: the spread is on both sides.
        ([0.90, 0.98, 0.95], {"least": 0.97}, False),
        ([1.4, 1.5, 1.6], {"most": 1.3}, True),
        ([1.2, 1.5, 1.6], {"most": 1.3}, False),
        ([9.0], {}, False),
    ],
)
def test_a_target_is_missed_only_beyond_the_spread(values: list[float], bounds: Any, missed: bool) -> None:
    assert Ratio("other", values, **bounds).missed == missed


def test_a_target_within_the_noise_is_neither_met_nor_missed(tmp_path: Path, capsys: Any) -> None:
    modes = [speed("recording norms", "idle", [0.5, 0.9, 0.91, 0.92, 0.98], least=0.97)]
    status, out, _ = call("show", save_benchmark(tmp_path / "BENCH.json", modes), "-q", capsys=capsys)
    assert (status, out) == (0, "1 measurement: 0 of 1 target met, 1 within the noise\n")


def test_ratios_without_rounds_are_left_out(tmp_path: Path, capsys: Any) -> None:
    modes = [
        process("a", "limit", [], most=1.0),
        {"mode": "b", "ratios": [{"to": "peer", "of": "peer", "values": []}]},
    ]
    status, out, err = call("show", save_benchmark(tmp_path / "BENCH.json", modes), capsys=capsys)
    assert (status, err, out.splitlines()[0]) == (0, "", "2 measurements, none with a target")


def test_very_many_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="more than 1000 rounds"):
        open_benchmarks(save_benchmark(tmp_path / "BENCH.json", [process("a", "limit", [1.0] * 30_000)]))


def test_a_trace_may_be_called_like_a_benchmark(tmp_path: Path, capsys: Any) -> None:
    trace = mixed(tmp_path / "run.json", A, B)
    assert "modules took effect" in call("show", trace, capsys=capsys)[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    modes = [
        speed("with the adapter", "no LoRA", [0.5, 0.52, 0.51]),
        speed("recording tensors", "probe idle", [0.7, 0.71, 0.72], least=0.88),
        speed("probe idle", "no probe", [0.99, 1.01, 1.0]),
        process("lora-probe --help", "import numpy, rich", [1.3, 1.4, 1.35], most=1.5),
        {"something": "of another suite"},
    ]
    return save_benchmark(tmp_path / "BENCH.json", modes)


def test_it_is_shown(saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call("show", saved, capsys=capsys)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "5 measurements: 1 of 2 targets met; missed: recording tensors"
    (tensors,) = [line for line in lines if line.startswith("recording tensors") and "missed" in line]
    assert "0.71 (0.70-0.72)" in tensors
    assert ">= 0.88 of decode, missed" in tensors
    assert any(line.startswith("probe idle") and "1.00 (0.99-1.01) ±" in line for line in lines)
    assert any(line.startswith("lora-probe --help") and "<= 1.5" in line for line in lines)
    assert any(line.startswith("test_4") for line in lines)
    assert "A Processor, 2 cores" in out
    quiet = call("show", saved, "-q", capsys=capsys)[1]
    assert quiet.splitlines() == lines[:1]


def test_its_page_and_its_json(saved: Path, capsys: Any) -> None:
    html = call("show", saved, "--format", "html", capsys=capsys)[1]
    assert "recording tensors" in html
    assert "missed: recording tensors" in html
    report = json.loads(call("show", saved, "--format", "json", capsys=capsys)[1])
    tensors = report["measurements"][1]["ratios"][2]
    assert (tensors["of"], tensors["missed"], tensors["median"]) == ("decode", True, 0.71)


def test_an_option_for_traces_is_refused(saved: Path, capsys: Any) -> None:
    for words in (["--requests"], ["--load", "0"]):
        status, _, err = call("show", saved, *words, capsys=capsys)
        assert (status, f"{words[0]} is for traces" in err) == (2, True)
    status, _, err = call("show", saved, saved, capsys=capsys)
    assert (status, "a benchmark is shown by itself" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot read"),
        ("[]", "cannot read"),
        ('{"benchmarks": []}', "contains no benchmark"),
        ('{"benchmarks": [{"name": "x", "stats": {}}]}', "cannot read"),
        ('{"benchmarks": [{"name": "x", "stats": {"median": -1}}]}', "negative"),
        ('{"benchmarks": [{"name": "x", "stats": {"median": 1}, "extra_info": {"ratios": 3}}]}', "`extra_info` of `x`"),
        ('{"benchmarks": [{"name": "x", "stats": {"median": 1e999}}]}', "cannot read"),
    ],
)
def test_a_file_that_is_none(content: str, words: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "BENCH.json"
    path.write_text(content)
    with pytest.raises(UnreadableFile, match=words):
        open_benchmarks(path)
    status, out, err = call("show", path, capsys=capsys)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


def test_names_in_a_file_are_never_markup(tmp_path: Path, capsys: Any) -> None:
    path = save_benchmark(tmp_path / "BENCH.json", [speed("[bold]<img src=x>\x1b[31m", "<script>", [1.0, 1.1])])
    out = call("show", path, capsys=capsys)[1]
    assert "[bold]<img src=x>" in out
    assert "\x1b" not in out
    html = call("show", path, "--format", "html", capsys=capsys)[1]
    assert "<img src=x>" not in html
