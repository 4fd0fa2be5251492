"""Pairs that are too large for memory: the same spectrum block by block, and limited memory for any header."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from failures import write_config

from lora_probe.adapter import open_adapter
from lora_probe.adapter import spectrum as grams
from lora_probe.adapter.spectrum import spectrum

ROOM = 300
"""MiB that a check may use for any input."""
GIB = 2**30


@pytest.mark.parametrize("block", [7, 100, 2**20])
def test_blocks_give_the_spectrum_of_the_whole(block: int, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "BLOCK", block)
    opened = open_adapter(adapter)
    for pair in opened.modules[:3]:
        assert pair.a is not None
        assert pair.b is not None
        whole = spectrum(opened.values(pair.a), opened.values(pair.b), pair.scaling)
        blocks = grams.spectrum_in_blocks(opened.weights, pair.a, pair.b, pair.scaling)
        assert blocks is not None
        np.testing.assert_allclose(blocks.singular, whole.singular, rtol=1e-4, atol=1e-6)
        assert blocks.norm == pytest.approx(whole.norm, rel=1e-5)


@pytest.mark.slow
def test_a_check_of_six_gigabytes_stays_small(tmp_path: Path) -> None:
    """Three pairs of 2 GiB each, as a header may claim and a sparse file may contain."""
    folder = write_config(tmp_path / "a", {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]})
    header: dict[str, object] = {}
    end = 0
    for layer in range(3):
        for half, shape in (("A", [8, 2**25]), ("B", [2**25, 8])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + GIB]}
            end += GIB
    text = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    script = (
        "import resource, sys\n"
        "from lora_probe.cli.main import main\n"
        "status = main(['check', sys.argv[1]])\n"
        "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True, timeout=300
    )
    status, memory = done.stdout.splitlines()[-1].split()
    assert status == "1"
    assert "LP203" in done.stdout
    assert int(memory) < ROOM
