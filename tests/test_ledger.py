"""Fates, headlines, and the rows that a ledger expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, edited

from lora_probe import inspect
from lora_probe.base import open_base
from lora_probe.errors import UnreadableFile
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row, as_json, headline
from lora_probe.names import name_modules
from lora_probe.rules import all_rules, diagnose
from lora_probe.rules.lp2_weights import not_in_file
from lora_probe.rules.stored import expect


def row(module: str = "model.layers.0.q_proj", **changes: Finding) -> Row:
    return Row((module, "weight", None), {station: changes.get(station, OK) for station in STATIONS})


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({}, "took effect"),
        ({"stored": Finding("wrong", "LP201", "x")}, "wrong"),
        ({"agrees": Finding("wrong", "LP604", "x")}, "wrong"),
        ({"agrees": Finding("unknown")}, "took effect"),
        ({"applied": Finding("unknown")}, "unknown"),
        ({"read": Finding("absent", "LP501", "x")}, "lost"),
        ({"stored": Finding("wrong", "LP201", "x"), "placed": Finding("absent", "LP505", "x")}, "lost"),
    ],
)
def test_fates(changes: dict[str, Finding], fate: str) -> None:
    assert row(**changes).fate == fate


def test_headlines() -> None:
    rows = tuple(row(f"model.layers.{n}.self_attn.q_proj") for n in range(3))
    assert headline(Ledger("vllm", rows)) == "3 of 3 modules took effect"
    one = (*rows[:2], row("model.layers.5.self_attn.q_proj", stored=not_in_file()))
    assert headline(Ledger("vllm", one)) == (
        "2 of 3 modules took effect, 1 lost at stored: layer 5 q_proj is not in the file (LP204)"
    )
    assert headline(Ledger("vllm", (), True, "no")) == "refused by vllm: no (LP401)"
    assert not Ledger("vllm", ()).healthy
    mixed = (row("a", stored=Finding("wrong", "LP201", "r"), agrees=Finding("wrong", "LP604", "x")), row("b"))
    assert headline(Ledger("vllm", mixed)) == "1 of 2 modules took effect as trained, 1 wrong at stored: a: r (LP201)"


def test_modules_in_few_words() -> None:
    names = [f"model.layers.{n}.self_attn.{p}" for n in (0, 1, 2, 5) for p in ("q_proj", "k_proj")]
    assert name_modules([*names, "lm_head"]) == "layers 0-2, 5 q_proj, k_proj; lm_head"


def test_json_has_every_field_of_the_contract() -> None:
    found = as_json(Ledger("vllm", (row(read=Finding("absent", "LP501", "why")),)))
    assert found.keys() == {"refused", "message", "total", "took_effect", "wrong", "lost", "unknown", "modules"}
    (module,) = found["modules"]
    assert module["reason"] == "LP501"
    assert module["stations"] == {"stored": "ok", "read": "absent", "placed": "ok", "applied": "ok", "agrees": "ok"}


def test_every_code_has_a_rule_with_a_page() -> None:
    rules = all_rules()
    assert list(rules) == sorted(rules)
    for rule in rules.values():
        assert rule.code.startswith("LP")
        assert len(rule.page) > 100, rule.code
        assert "Why it matters" in rule.page
        assert rule.hint
        assert rule.name == rule.name.lower().replace(" ", "-")


def test_diagnostics_group_by_rule() -> None:
    rows = tuple(row(f"model.layers.{n}.q_proj", stored=not_in_file()) for n in range(4))
    (found,) = diagnose(Ledger("peft", rows))
    assert (found.code, found.severity, len(found.modules), found.engines) == ("LP204", "error", 4, ("peft",))
    (unknown,) = diagnose(Ledger("peft", (row(applied=Finding("unknown", "LP500", "not recorded")),)))
    assert unknown.severity == "warning"


def rename(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def test_a_dead_prefix_shares_the_row_of_its_module(adapter: Path, llama: Path, tmp_path: Path) -> None:
    shapes = open_base(str(llama)).shapes
    found = expect(inspect(edited(adapter, tmp_path / "a", rename("model.model.", "model.model.x."))), shapes)
    assert len(found) == 3 * LAYERS
    assert all(row.homeless and row.module in shapes for row in found)
    assert {row.expected_by for row in found} == {("config", "file")}


def test_two_names_for_one_module_do_not_share(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """A name without a module gets a separate row if the module already has an entry."""

    def double(tensors: dict[str, Any]) -> dict[str, Any]:
        more = {n.replace("layers.0", "x.layers.0"): t for n, t in tensors.items() if "layers.0.self_attn.q" in n}
        return tensors | more

    found = expect(inspect(edited(adapter, tmp_path / "a", double)), open_base(str(llama)).shapes)
    assert len(found) == 3 * LAYERS + 1
    (homeless,) = [row for row in found if row.homeless]
    assert homeless.module == "model.x.layers.0.self_attn.q_proj"


def test_a_module_beyond_the_base_has_a_row_to_itself(adapter: Path, llama: Path, tmp_path: Path) -> None:
    found = expect(
        inspect(edited(adapter, tmp_path / "a", rename("layers.2.", "layers.9."))), open_base(str(llama)).shapes
    )
    assert len(found) == 3 * LAYERS + 3
    assert sum(row.stored.code == "LP204" for row in found) == 3
    assert sum(row.homeless for row in found) == 3


def test_without_a_base_the_rows_are_those_of_the_file(adapter: Path) -> None:
    found = expect(inspect(adapter), None)
    assert len(found) == 3 * LAYERS
    assert not any(row.homeless for row in found)
    assert {row.expected_by for row in found} == {("config", "file")}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t * float("nan"), "LP205"),
        (lambda t: t * 0, "LP203"),
        (lambda t: t.flatten(), "LP206"),
        (lambda t: t[0, 0].reshape(()), "LP206"),
        (lambda t: t[:, :0], "LP206"),
        (lambda t: t[:, :4], "LP206"),
        (lambda t: t[:-1], "LP301"),
    ],
)
def test_damage_to_one_tensor_is_judged_at_stored(
    adapter: Path, llama: Path, tmp_path: Path, change: Any, code: str
) -> None:
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    damaged = edited(adapter, tmp_path / "a", lambda tensors: tensors | {name: change(tensors[name])})
    found = expect(inspect(damaged), open_base(str(llama)).shapes)
    assert {row.module: row.stored.code for row in found if row.stored.code} == {
        "model.layers.0.self_attn.k_proj": code
    }


def test_bases(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_base(str(llama)).shapes["model.layers.0.self_attn.k_proj"] == (64, 128)
    with pytest.raises(UnreadableFile, match="base model `a/b` was not found"):
        open_base("a/b")
    with pytest.raises(UnreadableFile, match="not a model folder"):
        open_base(str(tmp_path))
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(llama)
    (tmp_path / "hub" / "models--a--b" / "refs").mkdir()
    (tmp_path / "hub" / "models--a--b" / "refs" / "main").write_text("c0ffee\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_base("a/b").shapes == open_base(str(llama)).shapes
