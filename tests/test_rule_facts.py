"""The facts about each rule, and the places that its findings point to. No base model, no engine, no torch."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_trace_format import KEYS, process

import lora_probe
from lora_probe import check
from lora_probe.adapter import open_config
from lora_probe.base import open_base
from lora_probe.errors import ModelNotFound, NotLora, UnreadableFile
from lora_probe.ledger import OK, STATIONS, clauses, headline
from lora_probe.recording import Load, ModuleRecord, TraceWriter, open_trace
from lora_probe.rules import AdapterFinding, Diagnostic, all_rules, family_of, rule, survey
from lora_probe.rules.lp2_weights import not_in_file
from lora_probe.rules.registry import families
from lora_probe.rules.subject import Subject

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")


def adapter(folder: Path, config: dict[str, Any] | None = None, **extras: tuple[int, ...]) -> Path:
    """Two pairs of rank 4, and more tensors of each: `magnitude_vector=(16,)`."""
    folder.mkdir()
    values = np.random.default_rng(0)
    shapes = {f"lora_{name}": shape for name, shape in ({"A.weight": (4, 16), "B.weight": (16, 4)} | extras).items()}
    tensors = {
        f"base_model.model.{module}.{name}": values.standard_normal(shape, np.float32)
        for module in (Q, V)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {}), indent=1))
    return folder


def found(folder: Path, code: str, **options: Any) -> list[Diagnostic]:
    return list(check(folder, select=[code], options=options).diagnostics)


def pointed_at(folder: Path, diagnostic: Diagnostic) -> str | None:
    """The key of the config on the diagnostic's line; None where it is about the weights."""
    assert diagnostic.path is not None
    if diagnostic.path == str(folder / "adapter_model.safetensors"):
        assert diagnostic.line is None
        return None
    assert diagnostic.path == str(folder / "adapter_config.json")
    assert diagnostic.line is not None
    line = Path(diagnostic.path).read_text().splitlines()[diagnostic.line - 1]
    match = re.match(r' "(\w+)": ', line)
    assert match is not None, line
    return match[1]


# What a finding points at.


@pytest.mark.parametrize(
    ("config", "extras", "field"),
    [
        ({"use_dora": True}, {}, "use_dora"),
        ({"lora_bias": True}, {}, "lora_bias"),
        ({"kasa_config": {"x": 1}}, {}, "kasa_config"),
        ({"use_dora": True, "lora_bias": True}, {"magnitude_vector": (16,)}, "lora_bias"),
    ],
)
def test_a_missing_tensor_points_at_the_field_that_asks_for_it(
    tmp_path: Path, config: dict[str, Any], extras: dict[str, tuple[int, ...]], field: str
) -> None:
    folder = adapter(tmp_path / "a", {"use_dora": False} | config, **extras)
    (diagnostic,) = found(folder, "LP220")
    assert pointed_at(folder, diagnostic) == field
    assert f"`{field}` is set" in diagnostic.message
    assert diagnostic.engines == ("peft", "vllm")


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"r": 8}, {"r": {Q, V}}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {Q}}),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, {"r": {V}}),
        ({"r": 8, "rank_pattern": {"k_proj": 2}}, {"r": {Q, V}}),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, {"rank_pattern": {Q}, "r": {V}}),
    ],
)
def test_another_rank_points_at_what_gives_the_module_its_rank(
    tmp_path: Path, config: dict[str, Any], fields: dict[str, set[str]]
) -> None:
    folder = adapter(tmp_path / "a", config)
    diagnostics = found(folder, "LP201")
    assert {pointed_at(folder, one): set(one.modules) for one in diagnostics} == fields
    assert len(diagnostics) == len(fields)


@pytest.mark.parametrize(
    ("config", "field", "modules"),
    [
        ({"lora_alpha": 0}, "lora_alpha", {Q, V}),
        ({"alpha_pattern": {"v_proj": 0}}, "alpha_pattern", {V}),
        ({"lora_alpha": 0, "alpha_pattern": {"v_proj": 8}}, "lora_alpha", {Q}),
    ],
)
def test_an_alpha_of_zero_is_blamed(tmp_path: Path, config: dict[str, Any], field: str, modules: set[str]) -> None:
    folder = adapter(tmp_path / "a", config)
    (diagnostic,) = found(folder, "LP203")
    assert pointed_at(folder, diagnostic) == field
    assert set(diagnostic.modules) == modules
    assert field in diagnostic.message


def test_tensors_of_zero_are_blamed_themselves(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    save_file({name: np.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    (diagnostic,) = found(folder, "LP203")
    assert pointed_at(folder, diagnostic) is None


@pytest.mark.parametrize(
    ("config", "code", "field"),
    [
        ({"target_modules": ["q_proj"]}, "LP106", "target_modules"),
        ({"init_lora_weights": "lora_ga"}, "LP109", "init_lora_weights"),
        ({"base_model_name_or_path": "a/b-bnb-4bit"}, "LP314", "base_model_name_or_path"),
        ({"r": 32}, "LP402", "r"),
        ({"rank_pattern": {"q_proj": 32}}, "LP402", "rank_pattern"),
    ],
)
def test_a_finding_points_at_the_field_of_its_rule(
    tmp_path: Path, config: dict[str, Any], code: str, field: str
) -> None:
    folder = adapter(tmp_path / "a", config)
    (diagnostic,) = found(folder, code, max_lora_rank=16)
    assert pointed_at(folder, diagnostic) == field


def test_of_several_refusals_the_one_of_the_first_step_counts(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", {"use_dora": True}, magnitude_vector=(16,))
    report = check(folder)
    assert "LP210" in {diagnostic.code for diagnostic in check(folder, ignore=["LP406"]).diagnostics}
    assert report.ledgers["vllm"].code == "LP406"


def test_a_recorded_finding_reads_as_the_predicted_one(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t" / "peft", process()) as writer:
        writer.record(Load(0, "a", "/adapter", "d"))
        for key in KEYS:
            writer.record(ModuleRecord(0, *key, ["file"]))
        for station in STATIONS:
            writer.station(0, station, OK, KEYS[1:])
            writer.station(0, station, not_in_file(), KEYS[:1])
    ((_, ledger),) = open_trace(tmp_path / "t").loads
    (clause,) = clauses(ledger)
    assert clause.names_modules
    assert f"{clause.text} (LP204)" == clause.with_code
    assert headline(ledger).endswith(" is not in the file (LP204)")


# Errors of reading.

ENDLESS = r"(?:[a-z]+|\w+|[\w.]+)+[A-Z]"


@pytest.mark.parametrize(
    ("config", "key", "line", "engines"),
    [
        ({"r": "8"}, "r", 3, ("peft", "vllm")),
        ({"r": 0}, "r", 3, ("peft", "vllm")),
        ({"lora_alpha": None}, "lora_alpha", 4, ("peft", "vllm")),
        ({"rank_pattern": {"r": "x"}}, "rank_pattern", 9, ("peft", "vllm")),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern", 9, ("peft", "vllm")),
        ({"alpha_pattern": [1]}, "alpha_pattern", 9, ("peft", "vllm")),
        ({"target_modules": "(q_proj"}, "target_modules", 5, ("peft",)),
        ({"exclude_modules": 1}, "exclude_modules", 9, ("peft",)),
        ({"layers_pattern": "("}, "layers_pattern", 9, ("peft",)),
        ({"target_modules": ENDLESS}, "target_modules", 5, ("peft",)),
        ({"rank_pattern": {ENDLESS: 4}}, "rank_pattern", 9, ("peft", "vllm")),
    ],
)
def test_an_error_in_the_config_has_its_key_and_line(
    tmp_path: Path, config: dict[str, Any], key: str, line: int, engines: tuple[str, ...]
) -> None:
    folder = adapter(tmp_path / "a", config)
    report = check(folder, select=["LP101"])
    (diagnostic,) = report.diagnostics
    assert (pointed_at(folder, diagnostic), diagnostic.line, diagnostic.engines) == (key, line, engines)
    assert set(report.ledgers) == set(engines)


def test_an_error_of_reading_carries_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{\n "r": 4,\n "lora_alpha" 8\n}')
    with pytest.raises(UnreadableFile) as caught:
        open_config(path)
    assert (caught.value.line, caught.value.key) == (3, None)
    path.write_text('{\n "r": 4,\n "peft_type": "LOHA"\n}')
    with pytest.raises(NotLora) as other:
        open_config(path)
    assert (other.value.line, other.value.key) == (3, "peft_type")


def test_a_missing_model_has_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_base("nobody/nothing")
    with pytest.raises(UnreadableFile) as caught:
        open_base(str(tmp_path))
    assert not isinstance(caught.value, ModelNotFound)
    for name, words in (("nobody/nothing", "was not found"), (str(tmp_path), "cannot be read")):
        folder = adapter(tmp_path / words, {"base_model_name_or_path": name})
        (not_run,) = check(folder).not_run
        assert not_run.why == f"base model `{name}` {words}"


# The registry.


@pytest.mark.parametrize("decorate", [rule, survey])
@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (
            "LP204",
            "a-new-name",
            r"same code: LP204 not-in-the-file \(.*lp2_weights\) and LP204 a-new-name \(test_",
        ),
        ("LP298", "another-base", r"same name: LP312 another-base \(.*lp3_origin\) and LP298 another-base"),
    ],
)
def test_two_rules_of_one_code_or_name_cannot_be_registered(decorate: Any, code: str, name: str, words: str) -> None:
    before = all_rules()
    facts = (code, name, "stored", "wrong") if decorate is rule else (code, name)
    with pytest.raises(ValueError, match=words):

        @decorate(*facts, hint="none")
        def duplicate(subject: Subject) -> Iterator[AdapterFinding]:
            """Never asked."""
            yield from ()

    assert all_rules() == before


def test_a_family_holds_the_rules_of_its_number() -> None:
    for known in all_rules().values():
        module = known.module.rpartition(".")[2]
        assert module.startswith(f"lp{known.code[2]}_"), (known.code, module)
    assert list(families()) == [f"LP{number}" for number in range(1, 8)]
    assert {known.code[:3] for known in all_rules().values()} == set(families())
    assert len({family.title for family in families().values()}) == 7
    assert family_of("LP999").heading == "LP9xx"


def test_a_family_is_described_once() -> None:
    texts = [path.read_text() for path in Path(lora_probe.__file__).parent.glob("rules/lp*.py")]
    assert sum("\nFAMILY = " in text for text in texts) == len(families())


# Nothing decides by the text of a message of ours.

_METHODS = {"startswith", "endswith", "find", "index", "partition", "rpartition", "removeprefix", "removesuffix"}
_SEARCHES = {"search", "match", "fullmatch", "findall", "finditer", "split"}


def matches_on_messages(tree: ast.AST) -> list[int]:
    """The lines on which code looks into the text of a `message`: by a comparison, a method or an expression."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            wrong = any(map(_is_message, parts)) and not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            wrong = node.func.attr in _METHODS and _is_message(node.func.value)
            wrong |= node.func.attr in _SEARCHES and any(map(_is_message, node.args))
        else:
            continue
        lines += [node.lineno] if wrong else []
    return lines


def _is_message(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "message"


@pytest.mark.parametrize(
    "text",
    [
        'found.message.startswith("there is no")',
        '"lora_alpha" in finding.message',
        're.search("in line", error.message)',
        "_KEY.findall(message)",
        'message == "not in the file"',
        "sentence = row.message.removesuffix(x)",
    ],
)
def test_matching_on_a_message_is_seen(text: str) -> None:
    assert matches_on_messages(ast.parse(text)) == [1]


def test_nothing_matches_on_a_message() -> None:
    root = Path(lora_probe.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "plugins").rglob("*.py")]
    assert len(files) > 100
    wrong = {str(path): lines for path in files if (lines := matches_on_messages(ast.parse(path.read_text())))}
    assert not wrong


def test_a_flag_that_is_text_counts_as_true(tmp_path: Path) -> None:
    (diagnostic,) = found(adapter(tmp_path / "a", {"use_rslora": "false"}), "LP114")
    assert diagnostic.message == "`use_rslora` is the text 'false', which counts as true"
    assert not found(adapter(tmp_path / "b", {"use_rslora": False}), "LP114")


def test_a_text_for_a_list_of_modules_is_one_finding(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", {"modules_to_save": "lm_head"})
    (diagnostic,) = [one for one in check(folder).diagnostics if one.severity == "error"]
    assert (diagnostic.code, pointed_at(folder, diagnostic)) == ("LP112", "modules_to_save")
    assert "write a list of names" in diagnostic.hint
