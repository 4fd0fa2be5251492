"""The plugin with torch alone: contributions of one step, rows that should have none, and the level that is recorded.

No vLLM runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_probe.errors import ProbeError
from lora_probe.recording import SCHEMA, Run, RunSpec, write_json
from lora_probe_vllm.measured import Column, Columns, Stacked, Step
from lora_probe_vllm.rows import StepRows
from lora_probe_vllm.steps import contaminated_rows
from lora_probe_vllm.worker import bound_of, level_of

pytestmark = pytest.mark.slow

KEYS = (("q_proj", "weight", None), ("v_proj", "weight", None))
INPUTS, OUTPUTS, RANK = 16, 24, 4
BASE, FIRST, SECOND = 0, 1, 2
"""vLLM's adapter ids. Their slots are one less."""


def weights(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(RANK, INPUTS), torch.randn(OUTPUTS, RANK)


PAIRS = {FIRST: weights(1), SECOND: weights(2)}
GRAMS = {adapter - 1: torch.stack([b.T @ b] * len(KEYS)) for adapter, (_, b) in PAIRS.items()}


def step(requested: list[int], multiplied: list[int]) -> Step:
    """A step whose rows asked for one adapter and whose kernel multiplied with another. The kernel's table names a slot
    of its own for rows of the base, as on a backend that has none for them."""
    count = len(requested)
    x = torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(0))
    rows = StepRows([f"request-{number}" for number in range(count)], [0] * count, [1] * count, requested)
    shrink, written = torch.zeros(count, RANK), torch.zeros(count, OUTPUTS)
    for number, adapter in enumerate(multiplied):
        if adapter != BASE:
            a, b = PAIRS[adapter]
            shrink[number] = x[number] @ a.T
            written[number] = shrink[number] @ b.T
    found = Step(rows, [], mixed=BASE in requested)
    found.slots = torch.tensor([adapter - 1 for adapter in requested])
    for layer in range(len(KEYS)):
        found.widths[layer] = [OUTPUTS]
        found.shrink[layer] = shrink[None]
        found.written_norm[layer] = written.norm(dim=-1, keepdim=True)
    return found


def stack(one: Step, grams: dict[int, torch.Tensor] = GRAMS, claimed: np.ndarray | None = None) -> Stacked:
    """Each module is a layer of its own."""
    return Columns([Column(key, layer, 0) for layer, key in enumerate(KEYS)]).stack(one, grams, claimed)


def contaminated(one: Step, adapter: int) -> list[int]:
    """The rows of the base that got the contribution of `adapter`."""
    plain = one.rows.columns.lora == BASE
    return np.flatnonzero(contaminated_rows(stack(one), plain, GRAMS[adapter - 1])).tolist()


def test_rows_of_the_base_without_a_contribution() -> None:
    one = step([BASE, FIRST, BASE, SECOND], [BASE, FIRST, BASE, SECOND])
    norms = stack(one).delta_norm
    assert (norms[[0, 2]] == 0).all()
    assert (norms[[1, 3]] > 0).all()
    assert contaminated(one, FIRST) == contaminated(one, SECOND) == []


@pytest.mark.parametrize("adapter", [FIRST, SECOND])
def test_rows_of_the_base_that_got_one_are_counted_for_the_adapter_that_it_is_of(adapter: int) -> None:
    one = step([BASE, FIRST, BASE, SECOND, BASE], [adapter, FIRST, BASE, SECOND, adapter])
    assert contaminated(one, adapter) == [0, 4]
    assert contaminated(one, FIRST + SECOND - adapter) == []


def test_a_step_without_rows_of_the_base() -> None:
    assert contaminated(step([FIRST, SECOND], [FIRST, SECOND]), FIRST) == []


def test_a_module_that_did_not_run() -> None:
    one = step([BASE, FIRST], [FIRST, FIRST])
    for values in (one.shrink, one.written_norm):
        del values[1]
    assert contaminated(one, FIRST) == [0]
    assert np.isnan(stack(one).delta_norm[:, 1]).all()


def test_each_row_is_weighed_with_its_own_slot() -> None:
    one = step([FIRST, SECOND, FIRST], [FIRST, SECOND, FIRST])
    norms = stack(one).delta_norm
    for row, adapter in enumerate(one.rows.lora):
        b = PAIRS[adapter][1]
        np.testing.assert_allclose(norms[row], (one.shrink[0][0, row] @ b.T).norm(), rtol=1e-5)


def test_rows_of_a_slot_that_no_load_holds_have_the_norm_that_was_written() -> None:
    one = step([FIRST, SECOND], [FIRST, SECOND])
    norms = stack(one, {0: GRAMS[0]}, np.array([True, False])).delta_norm
    assert norms[0, 0] > 0
    np.testing.assert_allclose(norms[1, 0], one.written_norm[0][1, 0], rtol=1e-6)
    one.written_norm.clear()
    assert np.isnan(stack(one, {0: GRAMS[0]}, np.array([True, False])).delta_norm[1]).all()


def test_rows_in_columns() -> None:
    rows = StepRows(["a", "a", "a", "b", "c"], [2, 3, 4, 7, 0], [4, 4, 4, 2, 1], [1, 1, 1, 0, 2])
    columns = rows.columns
    assert columns.names == ("a", "b", "c")
    assert columns.request.tolist() == [0, 0, 0, 1, 2]
    assert columns.phase.tolist() == [0, 0, 1, 1, 0]
    assert list(columns.runs()) == [("a", 0, 0, 2), ("a", 1, 2, 1), ("b", 1, 3, 1), ("c", 0, 4, 1)]
    assert columns.by_request(columns.lora > 0) == {"a": 3, "c": 1}
    assert columns.by_request(columns.lora > 9) == {}


def test_the_level_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that `trace` starts is asked through run.json alone; the variable is for a user's own."""
    monkeypatch.setenv("LORA_PROBE_KEEP", "events")
    assert level_of(tmp_path) == "events"
    spec = RunSpec("vllm", "/a", "a", "/model", [], 1, keep="tensors")
    write_json(tmp_path / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {}))
    assert level_of(tmp_path) == "tensors"
    monkeypatch.setenv("LORA_PROBE_KEEP", "everything")
    assert level_of(tmp_path) == "tensors"


def test_the_level_of_a_users_own_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_PROBE_KEEP", raising=False)
    assert level_of(tmp_path) == "norms"
    monkeypatch.setenv("LORA_PROBE_KEEP", "everything")
    with pytest.raises(ProbeError, match="unknown level `everything` in LORA_PROBE_KEEP"):
        level_of(tmp_path)


def test_the_bound_of_a_users_own_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_PROBE_MAX_MB", raising=False)
    assert bound_of(tmp_path) == 512 * 2**20
    monkeypatch.setenv("LORA_PROBE_MAX_MB", "3")
    assert bound_of(tmp_path) == 3 * 2**20
    for wrong in ("", "0", "-1", "1.5", "512MB", "٣", "9" * 30):
        monkeypatch.setenv("LORA_PROBE_MAX_MB", wrong)
        with pytest.raises(ProbeError, match=f"invalid bound `{wrong}` in LORA_PROBE_MAX_MB") as refused:
            bound_of(tmp_path)
        assert "LORA_PROBE_MAX_MB=512" in refused.value.hint
    # A run that `trace` started ends by itself.
    spec = RunSpec("vllm", "/a", "a", "/model", [], 1)
    write_json(tmp_path / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {}))
    assert bound_of(tmp_path) is None
