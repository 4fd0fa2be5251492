"""Results in Python and in notebooks: short reprs, HTML, dictionaries, tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from served import A, B, mixed
from test_compare_runs import record

import lora_probe
from lora_probe.presented import Presented

LONGEST = 400


def results(adapter: Path, tmp_path: Path) -> list[Presented]:
    trace = lora_probe.open_trace(record(tmp_path / "run"))
    report = lora_probe.check(adapter, engines=["peft"])
    return [
        lora_probe.inspect(adapter),
        lora_probe.diff(adapter, adapter),
        report,
        report.ledgers["peft"],
        trace,
        lora_probe.open_trace(mixed(tmp_path / "mixed", A, B)),
        lora_probe.compare_each(trace, trace),
        lora_probe.compare(trace, trace),
    ]


def test_every_result_is_short_and_has_html_and_tables(adapter: Path, tmp_path: Path) -> None:
    for result in results(adapter, tmp_path):
        name = type(result).__name__
        assert repr(result).startswith(f"<{name}"), name
        assert len(repr(result)) < LONGEST
        html = result._repr_html_()
        assert html.startswith('<div class="lora-probe">')
        assert "<script" not in html
        data = result.to_dict()
        for table in result.tables().values():
            assert {column.ndim for column in table.values()} <= {1}
            assert len({len(column) for column in table.values()}) <= 1
        assert isinstance(data, dict)


def test_columns_of_modules(adapter: Path) -> None:
    opened = lora_probe.inspect(adapter)
    plain, modules = opened.tables()["modules"], opened.tables(norms=True)["modules"]
    assert "norm" not in plain
    assert modules["norm"].dtype == np.float64
    assert (modules["norm"] > 0).all()
    assert modules["layer"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert modules["projection"].tolist()[:3] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(TypeError, match="`norms` is for adapters, not for Report"):
        lora_probe.check(adapter, engines=["peft"]).to_dict(norms=True)


def test_a_result_whose_files_are_gone_still_has_a_repr(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "run", A)
    trace = lora_probe.open_trace(folder)
    events = folder / "vllm-rank-0" / "events.jsonl"
    events.rename(folder / "gone")
    assert repr(trace).startswith(f"<Trace {folder}: ")


def test_public_names_have_documentation() -> None:
    for name in dir(lora_probe):
        if not name.startswith("_"):
            assert (getattr(lora_probe, name).__doc__ or "").strip(), name
