"""`--format html`, `markdown`, `csv`, `junit` and `chrome`: what they contain, and that nothing in them is markup or a
formula of a file."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import call
from reports import made_up
from safetensors.numpy import save_file
from served import A, B, mixed

from lora_probe.ledger import Finding

runs = pytest.fixture(made_up, name="runs")
INJECTION = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}{% if 1 %}|`*_[a](javascript:1)"
MOST = 500_000
"""Bytes of a page of 1,000 modules."""


def adapter_of(folder: Path, modules: list[str], rank: int = 2, base: str = INJECTION) -> Path:
    """An adapter of these modules, without a base."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    tensors = {}
    for module in modules:
        for half, shape in (("A", (rank, 8)), ("B", (16, rank))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = numbers.normal(size=shape).astype("f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": base}))
    return folder


def page(*words: object, capsys: Any) -> str:
    status, out, error = call(*words, "--format", "html", capsys=capsys)
    assert status in (0, 1), error
    return out


def test_a_page_is_one_file_that_loads_nothing(tmp_path: Path, capsys: Any) -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    html = page("inspect", adapter_of(tmp_path / "a", names, base="org/base"), "--norms", capsys=capsys)
    assert html.startswith("<!doctype html>")
    assert re.findall(r"(?:src=|href|@import|url\()", html) == []
    policy = re.search(r"script-src 'sha256-([^']+)'", html)
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    assert policy is not None
    assert policy[1] == base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in html
    title = html[html.index("<h1>") : html.index("</h1>")]
    assert "LoRA, rank 2, scaling 2: 4 modules" in title
    assert html.index("<h1>") < html.index("<table")
    assert html.count("<polyline") == 4


def test_names_of_files_are_never_markup(tmp_path: Path, capsys: Any) -> None:
    """Every name is an attempt at script injection."""
    folder = adapter_of(tmp_path / "a", [f"model.layers.0.{INJECTION}.q_proj", "model.layers.1.q_proj"])
    for words in (("inspect", folder), ("inspect", folder, "--norms"), ("inspect", folder, folder), ("check", folder)):
        html = page(*words, capsys=capsys)
        assert "<img" not in html
        assert "alert(1)</script>" not in html
        assert ">49" not in html
        assert html.count("<script>") == 1
        markdown = call(*words, "--format", "markdown", capsys=capsys)[1]
        # Code spans show their content as it is.
        assert "<img" not in re.sub("`[^`]*`", "", markdown).replace("\\<img", "")


@pytest.mark.slow
def test_a_page_of_a_thousand_modules(tmp_path: Path, capsys: Any) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    modules = [f"model.layers.{layer}.{name}" for layer in range(200) for name in names]
    folder = adapter_of(tmp_path / "a", modules, rank=8)
    assert len(page("inspect", folder, "--norms", capsys=capsys).encode()) < MOST


def test_findings_and_fates(runs: Path, capsys: Any) -> None:
    html = page("check", "damaged", capsys=capsys)
    assert "1 error, 1 warning in damaged/" in html
    assert '<section class="finding error">' in html
    assert "lora-probe rule LP204" in html
    assert "lost at stored" in html
    many = page("check", "healthy", "damaged", capsys=capsys)
    assert "2 adapters: 1 without findings, 1 with errors" in many


def test_a_recording(tmp_path: Path, capsys: Any) -> None:
    trace = mixed(tmp_path / "run", A, B)
    html = page("show", trace, capsys=capsys)
    assert "A: 4 of 4 modules took effect; B: 2 of 2 modules took effect" in html
    assert "Contribution of each module of A (load 0)" in html
    assert '<ol class="timeline">' in html


def test_csv_has_a_row_for_each_module(tmp_path: Path, capsys: Any) -> None:
    folder = adapter_of(tmp_path / "a", ["model.layers.0.q_proj", "=cmd|'/c calc'!A0.q_proj"])
    rows = list(csv.DictReader(io.StringIO(call("inspect", folder, "--norms", "--format", "csv", capsys=capsys)[1])))
    assert {row["module"] for row in rows} == {"model.layers.0.q_proj", "'=cmd|'/c calc'!A0.q_proj"}
    assert float(rows[0]["norm"]) > 0
    trace = mixed(tmp_path / "run", A, B)
    rows = list(csv.DictReader(io.StringIO(call("show", trace, "--format", "csv", capsys=capsys)[1])))
    assert [row["adapter"] for row in rows] == [*"AAAA", *"BB"]
    assert float(rows[0]["strength"]) == pytest.approx(0.7)
    assert {row["fate"] for row in rows} == {"took effect"}


def test_csv_and_junit_of_checks(runs: Path, capsys: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(call("check", "damaged", "healthy", "--format", "csv", capsys=capsys)[1])))
    assert [row["code"] for row in rows] == ["LP204", "LP201"]
    assert call("check", "healthy", "--format", "csv", capsys=capsys)[1].startswith("adapter,code,")
    status, out, _ = call("check", "damaged", "healthy", "--format", "junit", capsys=capsys)
    assert status == 1
    suite = ElementTree.fromstring(out)
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "1")
    failure = suite.find("testcase[@name='damaged']/failure")
    assert failure is not None
    assert "LP204 not-in-the-file" in (failure.text or "")
    healthy = suite.find("testcase[@name='healthy']")
    assert healthy is not None
    assert healthy.find("failure") is None


def test_chrome_has_a_track_for_each_process(tmp_path: Path, capsys: Any) -> None:
    trace = mixed(tmp_path / "run", A, B)
    data = json.loads(call("show", trace, "--format", "chrome", capsys=capsys)[1])
    names = [event["args"]["name"] for event in data["traceEvents"] if event["name"] == "process_name"]
    assert [name.split(" (")[0] for name in names] == ["lora-probe vllm-rank-0"]
    steps = [event for event in data["traceEvents"] if event["ph"] in "Xi"]
    assert [step["name"] for step in steps] == ["A from /adapters/A", "B from /adapters/B"]
    assert all(step["ts"] >= 0 for step in steps)
    threads = [event["tid"] for event in data["traceEvents"] if event["name"] == "thread_name"]
    assert len(threads) == len(set(threads))


def test_markdown_has_the_verdict_and_the_findings(tmp_path: Path, capsys: Any) -> None:
    fault = Finding("wrong", code="LP504", message="the slot differs")
    trace = mixed(tmp_path / "run", A.__class__(0, "A", fault=fault))
    out = call("show", trace, "--format", "markdown", capsys=capsys)[1]
    assert out.startswith("## 3 of 4 modules took effect as trained, 1 wrong")
    assert "LP504" in out
    assert "| layer |" in out
