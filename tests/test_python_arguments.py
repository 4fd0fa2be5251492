"""List arguments of the Python interface: one string is one word, never its characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora_probe
from lora_probe.checking.check import check
from lora_probe.engines.launch import flags_of
from lora_probe.errors import ProbeError, words_of


@pytest.mark.parametrize(
    ("value", "words"),
    [("Who are you?", ["Who are you?"]), (("a", "b"), ["a", "b"]), (iter(["a"]), ["a"]), ((), []), (None, [])],
)
def test_words(value: object, words: list[str]) -> None:
    assert words_of("prompts", value) == words


@pytest.mark.parametrize(("value", "kind"), [(b"Who", "int"), ([["a"]], "list"), (3, "int"), (["a", None], "NoneType")])
def test_what_is_no_list_of_words(value: object, kind: str) -> None:
    with pytest.raises(ProbeError, match=f"`prompts` must be a string or a list of strings, not of {kind}"):
        words_of("prompts", value)


def test_the_public_functions_can_be_completed() -> None:
    assert {"check", "compare", "inspect", "open_trace", "parity", "trace"} <= set(dir(lora_probe))


def test_flags_in_one_string_are_not_split() -> None:
    with pytest.raises(ProbeError, match="must be a list of words") as refused:
        flags_of("--seed 3")
    assert refused.value.hint == "pass engine_args=['--seed', '3']"
    assert flags_of(["--seed", "3"]) == ["--seed", "3"]


def test_a_rule_is_selected_by_a_string(adapter: Path) -> None:
    for changes in ({"select": "LP2"}, {"ignore": "LP301"}, {"options": {"lora_target_modules": "q_proj"}}):
        as_list: Any = {
            name: [word] if isinstance(word, str) else {"lora_target_modules": ["q_proj"]}
            for name, word in changes.items()
        }
        arguments: Any = changes
        assert check(adapter, **arguments).diagnostics == check(adapter, **as_list).diagnostics


@pytest.mark.slow
def test_a_string_is_one_prompt(adapter: Path, tmp_path: Path) -> None:
    trace = lora_probe.trace(adapter, engine="peft", prompts="Who are you?", max_tokens=1, out=tmp_path / "run")
    assert [prompt.text for prompt in trace.run.spec.prompts] == ["Who are you?"]
    with pytest.raises(ProbeError, match="`prompts` must be"):
        lora_probe.parity(adapter, prompts=[1])  # type: ignore[list-item]
