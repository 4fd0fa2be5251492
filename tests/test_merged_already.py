"""A base that already contains the adapter is recognised, and no other base is: LP320."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merges import merge_by_peft, save_adapter_of, save_model
from safetensors.numpy import load_file, save_file
from test_predictions import errors
from written import edited, write_adapter, write_base

from lora_probe import check
from lora_probe.adapter import open_adapter
from lora_probe.rules.containment import Share, contained, share


def merged(base: Path, adapter: Path, factor: float = 1.0, only: str = "", dtype: str = "float32") -> None:
    """Add the adapter to the weights of its base, in place."""
    weights = load_file(base / "model.safetensors")
    opened = open_adapter(adapter)
    for pair in opened.modules:
        if only in pair.module:
            assert pair.a is not None
            assert pair.b is not None
            delta = pair.scaling * opened.values(pair.b) @ opened.values(pair.a)
            name = f"{pair.module}.weight"
            weights[name] = weights[name] + (factor * (delta.T if opened.config.raw["fan_in_fan_out"] else delta))
    if dtype == "bfloat16":
        # Round to nearest, ties to even.
        bits = {name: values.astype(np.float32).view(np.uint32) for name, values in weights.items()}
        weights = {name: (b + 0x7FFF + ((b >> 16) & 1) & 0xFFFF0000).view(np.float32) for name, b in bits.items()}
    stored = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in weights.items()}
    save_file(stored, base / "model.safetensors")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 8},
    "rank 32": {"r": 32, "lora_alpha": 16},
    "rslora": {"r": 16, "use_rslora": True},
    "small": {"trained": 0.01},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_merged_base_is_recognised(name: str, dtype: str, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        base = write_base(tmp_path / f"base-{seed}")
        adapter = write_adapter(tmp_path / f"a-{seed}", base, seed=seed, **SETTINGS[name])
        assert errors(check(adapter, model=str(base))) == set()
        merged(base, adapter, dtype=dtype)
        report = check(adapter, model=str(base))
        assert errors(report) == {"LP320"}
        (diagnostic,) = [one for one in report.diagnostics if one.code == "LP320"]
        assert "already contains" in diagnostic.message
        assert all(ledger.healthy for ledger in report.ledgers.values())


@pytest.mark.parametrize("settings", [{"factor": 0.0}, {"factor": 0.3}, {"factor": 2.0}, {"only": "layers.1"}])
def test_what_is_not_one_merge_is_not_reported(settings: dict[str, Any], tmp_path: Path) -> None:
    """`parity` tells how it was merged; here only the whole adapter at its own scaling is certain."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base)
    merged(base, adapter, **settings)
    assert "LP320" not in errors(check(adapter, model=str(base)))


def test_the_weights_of_gpt2_are_stored_the_other_way_round(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    adapter = write_adapter(tmp_path / "a", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert "LP320" not in errors(check(adapter, model=str(base)))
    merged(base, adapter)
    assert "LP320" in errors(check(adapter, model=str(base)))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_base_is_not_a_merge(init: str, tmp_path: Path) -> None:
    """The base contains what PiSSA started with, too: PEFT takes it out, and LP317 reports a config without it."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base, init_lora_weights=init, trained=1e-4)
    assert "LP320" not in errors(check(adapter, model=str(base)))
    scrubbed = edited(adapter, tmp_path / "b", config=lambda raw: raw | {"init_lora_weights": True})
    assert {"LP317", "LP320"} & errors(check(scrubbed, model=str(base))) == {"LP317"}


def test_a_small_change_in_a_large_weight_tells_nothing() -> None:
    numbers = np.random.default_rng(0)
    a, b, weight = (numbers.normal(0, 1, shape).astype(np.float32) for shape in ((4, 64), (96, 4), (96, 64)))
    pair: Any = None
    for strength, clear in ((1e-3, False), (1.0, True)):
        measured = share(a, b * strength, 1.0, weight + strength * b @ a)
        assert measured is not None
        result = contained([Share(pair, *measured)] * 2)
        assert (result is not None) == clear


def test_the_noise_is_that_of_the_weight_in_the_directions_of_the_pair() -> None:
    """The share of unrelated pairs lies within a few deviations, also in a weight with a few strong directions."""
    numbers = np.random.default_rng(1)
    weight = numbers.normal(0, 1, (96, 64)) + 50 * np.outer(numbers.normal(size=96), numbers.normal(size=64)) / 80
    measured = []
    for _ in range(300):
        a, b = numbers.normal(0, 1, (4, 64)), numbers.normal(0, 1, (96, 4))
        measured.append(share(a.astype(np.float32), b.astype(np.float32), 0.5, weight.astype(np.float32)))
    ratios = np.array([value / noise for value, noise, _ in filter(None, measured)])
    assert 0.3 < ratios.std() < 1.2
    assert np.abs(ratios).max() < 5


@pytest.mark.parametrize(("factor", "rank"), [(np.nan, 1), (0, 1), (1, 4)])
def test_what_has_no_share(factor: float, rank: int) -> None:
    """A pair that changes nothing, one that is not finite, and one of full rank."""
    numbers = np.random.default_rng(2)
    a, b, weight = (numbers.normal(size=shape).astype(np.float32) for shape in ((rank, 4), (8, rank), (8, 4)))
    assert share(a, b * np.float32(factor), 1.0, weight) is None
    assert share(a[:1], b[:, :1], 1.0, weight) is not None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_by_peft_is_recognised(dtype: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", dtype)
    adapter = save_adapter_of(tmp_path / "a", base, target_modules="all-linear")
    merge_by_peft(tmp_path / "merged", adapter, base, dtype)
    assert "LP320" not in errors(check(adapter, model=str(base)))
    report = check(adapter, model=str(tmp_path / "merged"))
    (diagnostic,) = [one for one in report.diagnostics if one.severity == "error"]
    assert diagnostic.code == "LP320"
    # The hint is followed.
    named = re.search(r"--model (\S+),", diagnostic.hint)
    assert named is not None
    assert check(adapter, model=named[1]).diagnostics == ()
