"""The low-rank arithmetic against numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest

from lora_probe.adapter.spectrum import delta_norms, effective_rank, gram, spectrum

rng = np.random.default_rng(3)


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 5, 7), (8, 64, 32), (16, 20, 100), (9, 4, 6), (9, 6, 4)])
def test_singular_values_are_those_of_the_product(rank: int, inputs: int, outputs: int) -> None:
    a = rng.standard_normal((rank, inputs)).astype(np.float32)
    b = rng.standard_normal((outputs, rank)).astype(np.float32)
    expected = np.linalg.svd(1.5 * b.astype(np.float64) @ a, compute_uv=False)
    found = spectrum(a, b, 1.5)
    count = min(rank, inputs, outputs)
    np.testing.assert_allclose(found.singular[:count], expected[:count], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.norm, np.linalg.norm(expected), rtol=1e-5)


def test_small_singular_values_take_double_precision() -> None:
    a = np.diag([1.0, 1e-5]).astype(np.float32)
    found = spectrum(a, np.eye(2, dtype=np.float32), 1.0)
    np.testing.assert_allclose(found.singular, [1.0, 1e-5], rtol=1e-3)


def test_a_rank_beyond_both_sides_costs_no_matrix_of_its_own() -> None:
    found = spectrum(np.ones((100_000, 2), np.float32), np.ones((3, 100_000), np.float32), 1.0)
    assert found.norm == pytest.approx(100_000 * 6**0.5)
    assert len(found.singular) == 100_000


def test_values_whose_squares_leave_float32() -> None:
    found = spectrum(np.full((2, 3), 1e30, np.float32), np.full((4, 2), 1e30, np.float32), 1.0)
    assert found.norm == pytest.approx(2e60 * 12**0.5, rel=1e-6)


def test_dependent_rows_have_no_cholesky_factor() -> None:
    """Two equal rows of A, and a third of zeros."""
    a = np.stack([np.ones(6), np.ones(6), np.zeros(6)]).astype(np.float32)
    b = rng.standard_normal((5, 3)).astype(np.float32)
    expected = np.linalg.svd(b.astype(np.float64) @ a, compute_uv=False)
    found = spectrum(a, b, 1.0)
    assert found.norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    np.testing.assert_allclose(found.singular, expected[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(3, 6, 5), (9, 4, 6)])
def test_one_value_that_is_no_number(value: float, rank: int, inputs: int, outputs: int) -> None:
    """Also where the other half is zero."""
    whole = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
    for half in (0, 1):
        halves = [values.copy() for values in whole]
        halves[half][1, 2] = value
        assert not spectrum(halves[0], halves[1], 1.0).finite


def test_effective_rank() -> None:
    assert effective_rank(np.ones(4)) == pytest.approx(4)
    assert effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0


def test_nothing_and_no_number() -> None:
    zero = spectrum(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32), 2.0)
    assert (zero.norm, zero.effective_rank) == (0.0, 0.0)
    broken = spectrum(np.full((2, 3), np.nan, np.float32), np.ones((4, 2), np.float32), 2.0)
    assert not broken.finite


def test_norms_of_rows_need_no_delta() -> None:
    shrink = rng.standard_normal((10, 4)).astype(np.float32)
    b = rng.standard_normal((30, 4)).astype(np.float32)
    expected = np.linalg.norm(shrink @ (0.5 * b).T, axis=-1)
    np.testing.assert_allclose(delta_norms(shrink, gram(b, 0.5)), expected, rtol=1e-5)
