"""The example notebook runs, and its cells were executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import record_peft
from written import edited

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook" / "results.ipynb"


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_its_cells_were_executed_in_order() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    pages = [output for output in outputs if "lora-probe" in "".join(output.get("data", {}).get("text/html", []))]
    assert pages
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/root" not in text
    assert "/work" not in text


@pytest.mark.slow
def test_it_runs_on_other_adapters_and_traces(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """Its first cell names the folders; here they are others, and pandas is the real one."""
    shutil.copytree(adapter, tmp_path / "training" / "checkpoint-1")
    edited(adapter, tmp_path / "training" / "checkpoint-2", lambda tensors: tensors)
    for name in ("peft", "vllm"):
        record_peft(adapter, llama, tmp_path / f"{name}.lptrace")
    here: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        exec("".join(cell["source"]), here)
        if number == 0:
            here["ADAPTERS"], here["TRACES"] = tmp_path / "training", tmp_path
    assert len(here["modules"]) == 9
    assert here["comparison"].verdict == "agree"
