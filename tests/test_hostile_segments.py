"""Segments and scored passes of untrusted traces: one clear error, or the rows as they were written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_trace_format import KEYS
from traces import (
    SCORE,
    SECOND,
    SEGMENT,
    TABLE,
    Damage,
    as_type,
    columns,
    header,
    refused,
    replaced,
    resaved,
    table,
    tensor,
    without,
)

from lora_probe import open_trace
from lora_probe.errors import UnreadableFile

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("bounded")]


def both(*damages: Damage) -> Damage:
    def damage(trace: Path) -> None:
        for one in damages:
            one(trace)

    return damage


SEGMENTS: list[tuple[str, Damage, str]] = [
    ("table of numbers", table("[1, 2, 3]"), "its table cannot be read: Expected `object`, got `array`"),
    ("table is a number", table("5"), "its table cannot be read: Expected `object`, got `int`"),
    ("table is nothing", table(""), "its table cannot be read"),
    ("table is deep", table('{"x": ' + "[" * 90_000), "its table cannot be read: it is nested too deeply"),
    ("table of half a pair", table('{"requests": ["\ud800"], "modules": []}'), "its table cannot be read"),
    ("no requests", without("requests"), "Object missing required field `requests`"),
    ("no modules", without("modules"), "Object missing required field `modules`"),
    ("modules are numbers", table(modules=[1, 2]), "Expected `array`, got `int`"),
    ("modules are pairs", table(modules=[["a", "b"], ["c", "d"]]), "Expected `array` of length 3"),
    ("an expert is text", table(modules=[["a", "b", "c"], *KEYS[1:]]), "Expected `int | null`, got `str`"),
    ("too few modules", table(modules=KEYS[:1], loads=[]), "expected F32 [4, 1]"),
    ("a module twice", table(modules=[*KEYS[:1], *KEYS[:1]]), f"contains the module `{KEYS[0][0]}` twice"),
    ("a name of escapes", table(modules=[["\x1b\n", "b", None]] * 2), "contains the module `\\x1b\\n` twice"),
    ("digests", table(loads=[{"load": 0, "placed": ["x"]}]), "its table has 1 digests for 2 modules"),
    (
        "old digests",
        both(columns(grams=None), table(loads=None, placed=["x"])),
        "its table has 1 digests for 2 modules",
    ),
    ("a load twice", table(loads=[{"load": 0}] * 2), "`grams` is F32 [1, 2, 2, 2], expected F32 [2, 2"),
    ("a load twice and no G", both(table(loads=[{"load": 0}] * 2), columns(grams=None)), "contains a load twice"),
    ("a load of -1", table(loads=[{"load": -1}]), "or one with a negative number"),
    ("loads are numbers", table(loads=[0]), "Expected `object`, got `int`"),
    ("G of no load", table(loads=[]), "`grams` is F32 [1, 2, 2, 2], expected F32 [0, 2"),
    (
        "G of loads that the table lacks",
        tensor("grams", (3, 2, 2, 2)),
        "is F32 [3, 2, 2, 2], expected F32 [1, 2",
    ),
    ("no metadata", lambda trace: resaved(trace / SEGMENT, lambda _, meta: meta.clear()), "no `table`"),
    *((f"no {name}", columns(**{name: None}), f"it has no column `{name}`") for name in ("request", "load", "x_norm")),
    *((f"no {name}", columns(**{name: None}), f"no column `{name}`") for name in ("phase", "position", "delta_norm")),
    ("request 1 of 1", columns(request=lambda a: a + 1), "belongs to request 1, but its table has 1 requests"),
    ("request -1", columns(request=lambda a: a - 1), "belongs to request -1, but its table has 1 requests"),
    ("no request", table(requests=[]), "belongs to request 0, but its table has 0 requests"),
    ("request I64", columns(request=as_type(np.int64)), "`request` is I64 [4], expected I32 [rows]"),
    ("request F32", columns(request=as_type(np.float32)), "`request` is F32 [4], expected I32"),
    ("load U8", columns(load=as_type(np.uint8)), "`load` is U8 [4], expected I32 [4]"),
    ("x_norm F64", columns(x_norm=as_type(np.float64)), "`x_norm` is F64 [4, 2], expected F32 [4, 2]"),
    ("shrink F16", columns(shrink=as_type(np.float16)), "`shrink` is F16 [4, 2, 2], expected F32 [4, 2, r]"),
    ("fewer rows", columns(position=lambda a: a[:2]), "`position` is I32 [2], expected I32 [4]"),
    ("more modules", tensor("output_norm", (4, 3)), "`output_norm` is F32 [4, 3], expected F32 [4, 2]"),
    ("a row of rows", columns(request=lambda a: a[None]), "`request` is I32 [1, 4], expected I32 [rows]"),
    ("a scalar", columns(request=lambda a: a[0]), "`request` is I32 [], expected I32 [rows]"),
    ("flat shrink", tensor("shrink", (4, 2)), "`shrink` is F32 [4, 2], expected F32 [4, 2, r]"),
    ("a short sketch", tensor("sketch", (4, 2, 3)), "`sketch` is F32 [4, 2, 3], expected F32 [4, 2, 32]"),
    ("G is no square", tensor("grams", (1, 2, 2, 3)), "`grams` is F32 [1, 2, 2, 3], expected F32 [1, 2, 2, 2]"),
    ("G is narrow", tensor("grams", (1, 2, 1, 1)), "G has rank 1, but `shrink` has rank 2"),
    ("an old G is no square", tensor("gram", (2, 2, 3)), "`gram` is F32 [2, 2, 3], expected F32 [2, 2, 2]"),
    ("an old G is narrow", columns(grams=None, gram=lambda _: np.ones((2, 1, 1), np.float32)), "G has rank 1"),
    *(
        (f"tensor {name}", tensor(name), "does not belong to any of its 2 modules")
        for name in ("x/2", "x/-1", "x/01", "x/٣", "base/", "delta/0/0", "x/" + "9" * 30, "base/\x1b")
    ),
    ("x of 2 rows", tensor("x/0", (2, 3)), "`x/0` is F32 [2, 3], expected F32 [4, width]"),
    ("x of norms", tensor("delta/1", (4,)), "`delta/1` is F32 [4], expected F32 [4, width]"),
    ("x F64", tensor("base/1", dtype=np.float64), "`base/1` is F64 [4, 3], expected F32 [4, width]"),
    ("cut", lambda trace: os.truncate(trace / SEGMENT, 100), "cannot read a segment: "),
    ("empty", lambda trace: os.truncate(trace / SEGMENT, 0), "is empty (0 bytes)"),
]

TOGETHER: list[tuple[str, Damage, str]] = [
    ("another x", columns(SECOND, **{"x/0": lambda a: a[:, :1]}), "the width of `x/0` differs from an earlier segment"),
]
"""Segments that are right by themselves, and whose rows cannot be joined."""


@pytest.mark.parametrize(("damage", "words"), [pytest.param(*rest, id=name) for name, *rest in SEGMENTS])
def test_a_segment_that_does_not_fit(
    damaged: Path, good: Path, damage: Damage, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(damaged)
    refused(damaged, good, words, capsys)


@pytest.mark.parametrize(("damage", "words"), [pytest.param(*rest, id=name) for name, *rest in TOGETHER])
def test_segments_that_do_not_fit_together(
    damaged: Path, good: Path, damage: Damage, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(damaged)
    refused(damaged, good, words, capsys, show_too=False)


def test_segments_of_other_ranks_and_levels_are_joined(damaged: Path) -> None:
    """Each adapter has its own rank, and a server's level may be changed: the widest counts."""
    columns(SECOND, shrink=lambda a: a[..., :1])(damaged)
    rows = open_trace(damaged).rows
    assert rows is not None
    assert rows.shrink is not None
    np.testing.assert_array_equal(rows.shrink[4:, 0], [[1, 0]] * 4)
    columns(SECOND, grams=lambda _: np.ones((1, 1, 3, 3), np.float32))(damaged)
    rows = open_trace(damaged).rows
    assert rows is not None
    assert rows.placed[0].gram is not None
    # The first G that is known stays.
    np.testing.assert_array_equal(rows.placed[0].gram[0], [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    columns(SECOND, shrink=None)(damaged)
    rows = open_trace(damaged).rows
    assert rows is not None
    assert rows.shrink is not None
    assert np.isnan(rows.shrink[4:]).all()
    assert (rows.shrink[:4] == 1).all()


def test_columns_that_nobody_knows_are_ignored(damaged: Path, good: Path) -> None:
    novel = {"novel": np.ones(3, np.int64), "y/0": np.ones((1, 1)), "x": np.ones(1)}
    resaved(damaged / SEGMENT, lambda tensors, _: tensors.update(novel))
    table(novel={"a": 1})(damaged)
    mine, theirs = open_trace(damaged).rows, open_trace(good).rows
    assert mine is not None
    assert theirs is not None
    assert [set(rows.x or ()) for rows in (mine, theirs)] == [set(KEYS)] * 2
    np.testing.assert_array_equal(mine.shrink, theirs.shrink)


def test_axes_that_hide_how_large_others_are(damaged: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without rows any shape takes no bytes, and a column for another module would be 2 EiB."""
    found = {"request": ("I32", [0]), "position": ("I32", [0]), "phase": ("I8", [0]), "load": ("I32", [0])}
    found |= {name: ("F32", [0, 1]) for name in ("x_norm", "base_norm", "delta_norm", "output_norm")}
    found |= {"shrink": ("F32", [0, 1, 2**59])}
    for name, keys in ((SEGMENT, KEYS[:1]), (SECOND, KEYS[1:])):
        meta = {"table": json.dumps({"modules": keys, "requests": []})}
        entries = {n: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for n, (dtype, shape) in found.items()}
        (damaged / name).write_bytes(header({"__metadata__": meta, **entries}))
    refused(damaged, good, "values together, more than the", capsys, show_too=False)


@pytest.mark.slow
def test_many_links_to_one_segment(damaged: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {name: np.zeros((2000, 2), np.float32) for name in ("x_norm", "base_norm", "delta_norm", "output_norm")}
    many |= {name: np.zeros(2000, np.int32) for name in ("request", "position", "load")}
    many |= {"phase": np.zeros(2000, np.int8), "shrink": np.zeros((2000, 2, 4000), np.float32)}
    save_file(many, damaged / SEGMENT, {"table": json.dumps(TABLE)})
    (damaged / SECOND).unlink()
    for number in range(2, 600):
        (damaged / "peft" / f"{number:06d}.safetensors").symlink_to("000001.safetensors")
    refused(damaged, good, "values together, more than the", capsys, show_too=False)


# Scored passes.


def scored(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    def with_score(tensors: dict[str, Any], meta: dict[str, str]) -> None:
        score = json.loads(meta["score"])
        change(tensors, score)
        meta["score"] = json.dumps(score)

    resaved(path, with_score)


SCORES: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], object], str]] = [
    ("F64", lambda t, _: t.update(logprobs=t["logprobs"].astype(np.float64)), "`logprobs` is F64"),
    ("flat", lambda t, _: t.update(logprobs=t["logprobs"][0]), "`logprobs` is F32"),
    ("a row less", lambda t, _: t.update(logprobs=t["logprobs"][:1]), "`logprobs` is F32"),
    ("a negative token", lambda _, score: score.update(answer_ids=[3, -1]), "is negative"),
    ("a negative prompt", lambda _, score: score.update(prompt=-1), "is negative"),
    ("a token too far", lambda _, score: score.update(answer_ids=[3, 8]), "contains token 8, but its vocabulary has 8"),
    ("no answer", lambda _, score: score.pop("answer_ids"), "Object missing required field `answer_ids`"),
    ("a kind", lambda _, score: score.update(kind="\x1b"), "Invalid enum value"),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in SCORES])
def test_a_scored_pass_that_does_not_fit(damaged: Path, change: Any, words: str) -> None:
    scored(damaged / SCORE, change)
    with pytest.raises(UnreadableFile, match="next-000001") as caught:
        open_trace(damaged).scores  # noqa: B018
    assert words in caught.value.message
    assert caught.value.message.isprintable()


def test_distributions_are_read_when_they_are_asked_for(damaged: Path) -> None:
    first, second = open_trace(damaged).scores
    np.testing.assert_array_equal(first.logprobs(), np.full((2, 8), -2, np.float32))
    replaced(SCORE, os.mkfifo)(damaged)
    with pytest.raises(UnreadableFile, match=r"next-000001.safetensors` is a pipe"):
        first.logprobs()
    assert second.logprobs() is not None
