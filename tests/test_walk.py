"""`show --module`: one token through one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SharedEngine, call, record_peft
from served import A, B, mixed

from lora_probe import open_trace
from lora_probe.comparison.walk import beside, walk
from lora_probe.errors import ProbeError

Q = "model.layers.0.self_attn.q_proj"


def test_what_is_not_in_the_trace(good: Path, tmp_path: Path) -> None:
    trace = open_trace(good)
    module = trace.rows.modules[0][0] if trace.rows else ""
    for asked, words in (
        (("nothing",), "no module `nothing` has rows in this trace"),
        ((".",), "no module `.` has rows"),
        ((module, "zz"), "no request `zz` with an adapter"),
        ((module, None, 99), "no row at token 99 of request `a`"),
        ((module, None, -99), "no row at token -99"),
    ):
        with pytest.raises(ProbeError) as caught:
            walk(trace, *asked)
        assert words in caught.value.message
        assert caught.value.hint
    with pytest.raises(ProbeError, match="no request of an adapter in"):
        beside(open_trace(mixed(tmp_path / "server", A)), trace, walk(trace, module))


def test_a_row_with_everything(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = open_trace(good)
    assert trace.rows is not None
    module = trace.rows.modules[0][0]
    status, out, err = call("show", good, "--module", module, "--format", "json", capsys=capsys)
    (shown,) = json.loads(out)["walks"]
    assert (status, err) == (0, "")
    assert (shown["position"], shown["token"], shown["phase"]) == (1, 2, "prefill")
    assert shown["first_values"] == {"x": [1.0] * 3, "base": [1.0] * 3, "delta": [1.0] * 3}
    row = trace.rows.position.tolist().index(1)
    assert shown["x_norm"] == pytest.approx(float(trace.rows.x_norm[row, 0]))
    status, out, _ = call("show", good, good, "--module", module, "--token", -1, capsys=capsys)
    assert status == 0
    assert "the first values of base output" in out
    assert "difference" in out


def test_a_server_has_rows_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = mixed(tmp_path / "run", A, B)
    status, out, _ = call("show", trace, "--module", "layers.1.self_attn.q_proj", capsys=capsys)
    assert status == 0
    assert "x·Aᵀ, all numbers: not recorded; record with --keep shrink" in out
    assert "A (load 0)" in out
    of_b = "show", trace, "--module", "layers.1.self_attn.q_proj", "--adapter", "B"
    status, out, _ = call(*of_b, "--load", 1, capsys=capsys)
    assert status == 0
    assert "B (load 1)" in out
    status, _, err = call(*of_b, "--load", 0, capsys=capsys)
    assert status == 2
    assert "contains no rows of `B` in load 0" in err
    status, _, err = call(*of_b, "--follow", capsys=capsys)
    assert status == 2
    assert "--follow has no effect with --module" in err
    status, _, err = call("show", trace, "--module", "q_proj", capsys=capsys)
    assert status == 2
    assert "`q_proj` matches 2 modules" in err


@pytest.mark.parametrize("option", [("--token", "1"), ("--request", "a"), ()])
def test_options_of_one_module_need_it(option: tuple[str, ...], good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [good] if option else [good, good]
    status, _, err = call("show", *paths, *option, capsys=capsys)
    assert status == 2
    assert "needs --module" in err


@pytest.mark.engine
def test_both_engines_have_the_same_numbers(
    engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = record_peft(adapter, llama, tmp_path / "peft.lptrace", keep="tensors")
    there = engine.record(adapter, tmp_path / "vllm.lptrace", keep="tensors")
    for position in (0, 3, -2):
        first = walk(here, Q, position=position)
        second = beside(there, here, first)
        assert (first.token, first.position, first.decoded) == (second.token, second.position, second.decoded)
        assert (first.rank, first.scaling, first.width) == (second.rank, second.scaling, second.width)
        assert first.shrink == pytest.approx(second.shrink, rel=1e-5, abs=1e-6)
        assert first.strength == pytest.approx(second.strength, rel=1e-5)
        for name, values in first.first.items():
            assert values == pytest.approx(second.first[name], rel=1e-4, abs=1e-6)
        # ‖x·Aᵀ‖ and the contribution belong together: it is s·B of these numbers.
        assert first.delta_norm is not None
        assert first.delta_norm > 0
    capsys.readouterr()
    both = "show", here.path, there.path, "--module", Q, "--token", 3, "--format", "json"
    status, out, err = call(*both, capsys=capsys)
    assert (status, err) == (0, "")
    assert [walk["engine_as"] for walk in json.loads(out)["walks"]] == [Q, "model.layers.0.self_attn.qkv_proj[0]"]
