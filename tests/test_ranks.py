"""The rows of ranks are joined to what a single worker would have recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from lora_probe.names import Key
from lora_probe.recording import Placed, Rows, Shard
from lora_probe.recording.ranks import joined_ranks
from lora_probe.recording.rows import selected

KEYS: tuple[Key, ...] = tuple((name, "weight", None) for name in ("q", "k", "o", "whole"))
Q, K, OUT, WHOLE = KEYS
ROWS, WIDTH, RANK, RANKS = 6, 16, 3, 4
Array = npt.NDArray[np.float64]


class Module:
    """The weights of one module, and its input and outputs for all rows."""

    def __init__(self, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        self.x, self.w = numbers.normal(size=(ROWS, WIDTH)), numbers.normal(size=(WIDTH, WIDTH))
        self.a, self.b = numbers.normal(size=(RANK, WIDTH)), numbers.normal(size=(WIDTH, RANK))

    def measured(self, inputs: slice, outputs: slice, whole_output: bool) -> dict[str, Array]:
        """What a rank records that has these inputs and outputs. `whole_output`: the ranks have added up theirs."""
        x, b = self.x[:, inputs], self.b[outputs]
        shrink = x @ self.a[:, inputs].T
        base, delta = x @ self.w[outputs, inputs].T, shrink @ b.T
        output = self.x @ self.w.T + self.x @ self.a.T @ self.b.T if whole_output else base + delta
        return {"x": x, "base": base, "delta": delta, "output": output, "shrink": shrink, "gram": b.T @ b}


MODULES = {key: Module(seed) for seed, key in enumerate(KEYS)}
EVERYTHING = slice(None)


def shard_of(key: Key, rank: int) -> Shard | None:
    """k has two heads for four ranks."""
    return {
        Q: Shard("output", rank, RANKS),
        K: Shard("output", rank // 2, RANKS // 2),
        OUT: Shard("input", rank, RANKS),
        WHOLE: None,
    }[key]


def recorded(rank: int | None, keys: tuple[Key, ...] = KEYS) -> Rows:
    """The rows of a rank; of a single worker if it is None."""
    parts = {}
    for key in keys:
        shard = shard_of(key, rank) if rank is not None else None
        size = WIDTH // (shard.parts if shard is not None else 1)
        part = slice(shard.part * size, (shard.part + 1) * size) if shard is not None else EVERYTHING
        inputs, outputs = (part, EVERYTHING) if shard is not None and shard.axis == "input" else (EVERYTHING, part)
        parts[key] = MODULES[key].measured(inputs, outputs, whole_output=inputs is not EVERYTHING)

    def norms(name: str) -> npt.NDArray[np.float32]:
        return np.stack([np.linalg.norm(parts[key][name], axis=-1) for key in keys], 1).astype(np.float32)

    return Rows(
        modules=keys,
        requests=("a", "b"),
        request=np.array([0, 0, 0, 1, 1, 1], np.int32),
        position=np.array([0, 1, 2, 0, 1, 1], np.int32),
        phase=np.zeros(ROWS, np.int8),
        load=np.full(ROWS, 2, np.int32),
        x_norm=norms("x"),
        base_norm=norms("base"),
        delta_norm=norms("delta"),
        output_norm=norms("output"),
        shrink=np.stack([parts[key]["shrink"] for key in keys], 1).astype(np.float32),
        inner=np.stack([(parts[key]["output"] * parts[key]["delta"]).sum(-1) for key in keys], 1).astype(np.float32),
        **{name: {key: parts[key][name].astype(np.float32) for key in keys} for name in ("x", "base", "delta")},
        placed={2: Placed(("",) * len(keys), np.stack([parts[key]["gram"] for key in keys]).astype(np.float32))},
    )


def ranks(count: int = RANKS) -> list[tuple[Rows, dict[Key, Shard | None]]]:
    return [(recorded(rank), {key: shard_of(key, rank) for key in KEYS}) for rank in range(count)]


def test_they_are_what_one_worker_records() -> None:
    one, joined = recorded(None), joined_ranks(ranks())
    for name in ("x_norm", "base_norm", "delta_norm", "output_norm", "shrink"):
        np.testing.assert_allclose(getattr(joined, name), getattr(one, name), rtol=2e-5, err_msg=name)
    for name in ("x", "base", "delta"):
        for key in KEYS:
            np.testing.assert_allclose(getattr(joined, name)[key], getattr(one, name)[key], atol=1e-5)
    assert joined.placed[2].gram is not None
    assert one.placed[2].gram is not None
    np.testing.assert_allclose(joined.placed[2].gram, one.placed[2].gram, rtol=1e-5)
    assert (joined.requests, joined.modules, len(joined)) == (one.requests, one.modules, ROWS)


def test_a_part_that_is_missing_leaves_the_module_unknown() -> None:
    joined = joined_ranks(ranks(3))
    known = ~np.isnan(joined.delta_norm).all(axis=0)
    # Of k, the third rank has the same part as the fourth.
    assert dict(zip(KEYS, known.tolist(), strict=True)) == {Q: False, K: True, OUT: False, WHOLE: True}


def test_rows_that_only_some_ranks_have_are_left_out() -> None:
    parts = ranks()
    rows, shards = parts[1]
    order = [5, 4, 1, 0]
    chosen = {name: getattr(rows, name)[order] for name in ("request", "position", "phase", "load")}
    columns = ("x_norm", "base_norm", "delta_norm", "output_norm", "shrink", "inner")
    chosen |= {name: getattr(rows, name)[order] for name in columns}
    tables = {
        name: {key: values[order] for key, values in getattr(rows, name).items()} for name in ("x", "base", "delta")
    }
    parts[1] = replace(rows, **chosen, **tables), shards
    joined = joined_ranks(parts)
    one = recorded(None)
    assert list(zip(joined.request.tolist(), joined.position.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 1), (1, 1)]
    # The row that was computed twice is in the other order on that rank.
    np.testing.assert_allclose(joined.delta_norm[:2], one.delta_norm[:2], rtol=1e-5)


def test_pipeline_ranks_have_other_modules() -> None:
    first, second = recorded(None, KEYS[:2]), recorded(None, KEYS[2:])
    joined = joined_ranks([(first, {}), (second, {})])
    one = recorded(None)
    assert joined.modules == KEYS
    np.testing.assert_allclose(joined.delta_norm, one.delta_norm)
    np.testing.assert_allclose(joined.shrink, one.shrink)


def test_a_stage_without_some_rows_loses_none_of_the_others() -> None:
    """An adapter of one stage alone was used before another adapter was loaded."""
    first, second = recorded(None, KEYS[:2]), recorded(None, KEYS[2:])
    joined = joined_ranks([(first, {}), (selected(second, np.array([4, 1])), {})])
    assert len(joined) == ROWS
    known = ~np.isnan(joined.delta_norm)
    assert known[:, :2].all()
    assert known[:, 2:].sum(axis=0).tolist() == [2, 2]
    at = joined.position.tolist().index(1)
    np.testing.assert_allclose(joined.delta_norm[at], recorded(None).delta_norm[1], rtol=1e-5)
    one_first = joined_ranks([(selected(first, np.array([2])), {}), (second, {})])
    assert len(one_first) == ROWS
    assert (~np.isnan(one_first.shrink)).any(axis=-1).sum(axis=0).tolist() == [1, 1, ROWS, ROWS]


def test_a_single_rank_is_not_the_whole() -> None:
    joined = joined_ranks(ranks(1))
    known = ~np.isnan(joined.delta_norm).all(axis=0)
    assert dict(zip(KEYS, known.tolist(), strict=True)) == {Q: False, K: False, OUT: False, WHOLE: True}


def test_ranks_of_other_widths_and_with_wrong_parts() -> None:
    """As in a damaged trace: unknown, never an error."""
    parts = ranks()
    rows, shards = parts[0]
    wide = np.pad(rows.shrink, ((0, 0), (0, 0), (0, 2)))
    gram = np.pad(rows.placed[2].gram, ((0, 0), (0, 2), (0, 2)))
    tables = {key: np.pad(values, ((0, 0), (0, 3))) for key, values in rows.delta.items()}
    parts[0] = replace(rows, shrink=wide, placed={2: Placed(("",) * len(KEYS), gram)}, delta=tables), shards
    joined = joined_ranks(parts)
    np.testing.assert_allclose(joined.delta_norm, recorded(None).delta_norm, rtol=2e-5)
    assert OUT not in joined.delta
    parts[1] = parts[1][0], parts[1][1] | {Q: Shard("output", -1, RANKS)}
    assert np.isnan(joined_ranks(parts).delta_norm[:, KEYS.index(Q)]).all()


def test_without_shrink_a_partial_sum_is_unknown() -> None:
    parts = [(replace(rows, shrink=None, inner=None), shards) for rows, shards in ranks()]
    joined = joined_ranks(parts)
    assert np.isnan(joined.delta_norm[:, KEYS.index(OUT)]).all()
    assert not np.isnan(joined.delta_norm[:, KEYS.index(Q)]).any()


@pytest.mark.parametrize("seed", range(3))
def test_where_the_base_output_almost_cancels(seed: int) -> None:
    """‖base‖² is a difference of larger numbers there; it must not become NaN."""
    module = MODULES[OUT]
    before = module.w
    module.w = -(module.b @ module.a) * (1 + 1e-6 * seed)
    try:
        assert np.isfinite(joined_ranks(ranks()).base_norm).all()
    finally:
        module.w = before
