"""The contents of `adapter_config.json`: `AdapterConfig`.

In: the file of an adapter folder. Out: its fields, their types checked, and the lines they are on; the rank and the
scaling of a module (patterns, rsLoRA); which modules of a base it targets (`targets.py`). Patterns are those of PEFT
0.21: `get_pattern_key` in `peft/utils/other.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_probe.adapter.blocks import FIELD as BDLORA
from lora_probe.adapter.blocks import Blocks, blocks_in
from lora_probe.adapter.not_peft import not_peft
from lora_probe.adapter.pattern_index import PatternIndex, ending, is_word, plain_pattern
from lora_probe.adapter.targets import Targets, numbering, saving
from lora_probe.adapter.variants import initialisation, variants_of
from lora_probe.errors import NotLora, ProbeError, TooLarge, UnreadableFile
from lora_probe.files import brief, is_text, shown
from lora_probe.files.json_object import parsed, read_json, read_text, top_level
from lora_probe.files.limits import step
from lora_probe.files.regexes import Expressions, compiled

MAX_PATTERN = 100_000
"""Characters of one regular expression: compiling takes time and memory."""
MAX_EXPRESSIONS = 1_000
"""Regular expressions in one field; plain names do not count."""
MAX_CHARACTERS = 1_000_000
"""Characters of all expressions in one field."""

PEFT_DEFAULT_RANK = 8
PEFT_DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class TrainedAs:
    """How the base was loaded in training: PEFT's `task_type`, and the class that `auto_mapping` names.

    None where the config does not state it.
    """

    task: str | None = None
    model_class: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that decide what the adapter is; `raw` holds all of them."""

    path: Path
    base_model: str | None
    peft_version: str | None
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    raw: Mapping[str, Any] = field(repr=False)
    lines: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Top-level key: the line, from 1, of its last occurrence. That one counts, also for Python's json."""
    repeated: tuple[str, ...] = ()
    """Top-level keys that appear more than once in the file."""

    def base_or(self, model: str | None) -> str:
        """`model` if it is set, else the config's base model.

        Raises:
            ProbeError: neither is set.
        """
        name = model or self.base_model
        if name is None:
            raise ProbeError(f"`{self.path}` does not name a base model", "pass its folder or id with --model")
        return name

    @property
    def trained_as(self) -> TrainedAs:
        """How the base was loaded in training."""
        mapping = self.raw.get("auto_mapping")
        model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return TrainedAs(_text(self.raw.get("task_type")), _text(model_class))

    @property
    def variants(self) -> tuple[str, ...]:
        """What makes it more than plain LoRA, in the terms of PEFT's documentation."""
        titles = [variant.title for variant in variants_of(self.raw)]
        init = self.raw.get("init_lora_weights")
        known = initialisation(init)
        if isinstance(init, str) and not (known is not None and known.plain and init == known.name):
            titles.append(f"init {shown(init)}")
        if self.raw.get("bias", "none") != "none":
            titles.append(f"bias {_plain(self.raw['bias'])}")
        return tuple(titles)

    @property
    def kind(self) -> str:
        """`LoRA`, with what makes it more than that."""
        return "LoRA" + "".join(f" + {variant}" for variant in self.variants)

    @property
    def scaling(self) -> float:
        """The scaling of every module that no pattern matches: `alpha / r`, with rsLoRA `alpha / sqrt(r)`."""
        return self._scaling(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank of `module` in the config (`rank_pattern` first, then `r`)."""
        pattern = self.ranks.first(module)
        return self.rank if pattern is None else self.rank_pattern[pattern]

    def rank_field_of(self, module: str) -> str:
        """The key of the config that decides the rank of `module`."""
        return "r" if self.ranks.first(module) is None else "rank_pattern"

    def alpha_field_of(self, module: str) -> str:
        """The key of the config that decides the alpha of `module`."""
        return "lora_alpha" if self.alphas.first(module) is None else "alpha_pattern"

    def scaling_of(self, module: str) -> float:
        """The factor `s` of `s·B·A` for `module`, as PEFT and vLLM >= 0.32 compute it from the config alone."""
        pattern = self.alphas.first(module)
        return self._scaling(self.rank_of(module), self.alpha if pattern is None else self.alpha_pattern[pattern])

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targeted(self, names: Iterable[str]) -> list[str]:
        """Those of `names` (modules of a base) that PEFT would adapt with this config."""
        step("matching the names of modules", self.path)
        return [name for name in names if self.targets.module(name)]

    def targets_parameter(self, parameter: str) -> bool:
        """Whether target_parameters names `parameter`, the path of a weight (`model.layers.0.mlp.gate.weight`)."""
        return self.targets.parameter(parameter)

    @cached_property
    def blocks(self) -> Blocks:
        """Which modules have block-diagonal matrices (BD-LoRA)."""
        return blocks_in(self.raw) or Blocks()

    @cached_property
    def targets(self) -> Targets:
        """What the config targets."""
        return Targets(self.raw, self.target_modules, self._expressions)

    @cached_property
    def ranks(self) -> PatternIndex:
        """The keys of rank_pattern."""
        return PatternIndex("rank_pattern", self.rank_pattern, self._expressions)

    @cached_property
    def alphas(self) -> PatternIndex:
        """The keys of alpha_pattern."""
        return PatternIndex("alpha_pattern", self.alpha_pattern, self._expressions)

    @cached_property
    def _expressions(self) -> Expressions:
        return Expressions(self.path, self.lines)


def base_named_in(path: Path) -> str | None:
    """The base model that a config names, even if it is not one of LoRA or has a wrong field; None if it cannot be
    parsed."""
    try:
        name = _text(read_json(path).get("base_model_name_or_path"))
    except ProbeError:
        return None
    return name if name is not None and is_text(name) else None


def open_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        NotLora: it is the config of something other than a LoRA adapter.
        UnreadableFile: it is missing, not JSON (with the line), or a field has the wrong type (with its key).
    """
    text = read_text(path)
    raw = parsed(path, text)
    step("checking the fields", path)
    occurrences = top_level(text)
    source = _Source(path, raw, dict(occurrences))
    if (other := not_peft(raw)) is not None:
        line = source.lines.get(other.key) if other.key else None
        raise NotLora(f"`{path}` {other.what}", other.hint, line=line, key=other.key)
    if _HALF.search(text) and not is_text(json.dumps(raw, ensure_ascii=False)):
        raise UnreadableFile(
            f"`{path}` holds half of a surrogate pair (\\ud800 to \\udfff), which is not valid text",
            "replace the escape with the character that is meant",
        )
    return _config(source, tuple(key for key, count in Counter(key for key, _ in occurrences).items() if count > 1))


def config_of(fields: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The config of an adapter that has no file, from its fields; `path` is what errors call it.

    Raises:
        UnreadableFile: a field has the wrong type.
    """
    return _config(_Source(path, fields, {}), ())


def _config(source: _Source, repeated: tuple[str, ...]) -> AdapterConfig:
    raw = source.raw
    rank = _number(source, "r", PEFT_DEFAULT_RANK)
    if rank != int(rank) or rank < 1:
        raise source.error(
            "r",
            f"`r` is {brief(raw['r'])}; a rank must be a whole number, at least 1",
            "write the rank that the adapter was trained with: the first axis of its lora_A",
        )
    ranks = _table(source, "rank_pattern")
    if any(value != int(value) or value < 1 for value in ranks.values()):
        raise source.error(
            "rank_pattern",
            f"`rank_pattern` holds a value that is not a rank: {brief(ranks)}",
            "a rank must be a whole number, at least 1",
        )
    return AdapterConfig(
        path=source.path,
        base_model=_text(raw.get("base_model_name_or_path")),
        peft_version=_text(raw.get("peft_version")),
        rank=int(rank),
        alpha=_number(source, "lora_alpha", PEFT_DEFAULT_ALPHA),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern={key: int(value) for key, value in ranks.items()},
        alpha_pattern=_table(source, "alpha_pattern"),
        target_modules=_targets(source),
        raw=_checked(source),
        lines=source.lines,
        repeated=repeated,
    )


@dataclass(frozen=True)
class _Source:
    """The fields of a config, and the lines that they are on."""

    path: Path
    raw: Mapping[str, Any]
    lines: Mapping[str, int]

    def error(self, key: str, message: str, hint: str) -> UnreadableFile:
        """What is wrong with the field `key`."""
        return UnreadableFile(f"`{self.path}`: {message}", hint, line=self.lines.get(key), key=key)


def _checked(source: _Source) -> Mapping[str, Any]:
    """The other fields that decide which modules are meant, their types checked."""
    raw = source.raw
    for key, (kinds, what) in _KINDS.items():
        value = raw.get(key)
        items = value if isinstance(value, list) else []
        plain = tuple(kind for kind in kinds if kind is not list)
        if value is not None and (not isinstance(value, kinds) or not all(isinstance(i, plain) for i in items)):
            raise source.error(key, f"`{key}` is {brief(value)}, not {what}", "see PEFT's LoraConfig")
    if blocks_in(raw) is None:
        raise source.error(
            BDLORA,
            f"`{BDLORA}` is {brief(raw[BDLORA])}, not lists of names and a number of blocks",
            "see PEFT's LoraConfig",
        )
    excluded = raw.get("exclude_modules")
    if isinstance(excluded, str):
        _compile(source, "exclude_modules", excluded)
    saved = raw.get("modules_to_save") or ()
    _compile_all(source, "modules_to_save", [name for name in saved if not is_word(name)], saving)
    layers = raw.get("layers_pattern") or ()
    _compile_all(source, "layers_pattern", [layers] if isinstance(layers, str) else layers, numbering)
    return raw


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "exclude_modules": ((str, list), "a list of names or an expression"),
    "modules_to_save": ((list, str), "a list of names"),
    "layers_to_transform": ((int, list), "a layer number or a list of them"),
    "layers_pattern": ((str, list), "a name or a list of names"),
    "target_parameters": ((list, str), "a list of names"),
}


def _compile(source: _Source, key: str, pattern: str, *forms: str) -> None:
    """Compile an expression as written and in the forms in which it will be used (PEFT wraps it)."""
    if len(pattern) > MAX_PATTERN:
        raise TooLarge(
            f"`{source.path}`: {brief(pattern)} in `{key}` has {len(pattern):,} characters, more than the limit of "
            f"{MAX_PATTERN:,} for one expression",
            "write a list of names, or a shorter expression",
        )
    try:
        for form in (pattern, *forms):
            compiled(form)
    # A repetition too large for re is an OverflowError, one nested too deep a RecursionError.
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise source.error(
            key,
            f"{brief(pattern)} in `{key}` is not a valid regular expression: {why}",
            "PEFT matches module names with Python's re; write one that it compiles",
        ) from error


def _compile_all(source: _Source, key: str, patterns: Sequence[str], form: Callable[[str], str]) -> None:
    """Compile the expressions of one field."""
    for count, most, what in (
        (len(patterns), MAX_EXPRESSIONS, "regular expressions"),
        (sum(map(len, patterns)), MAX_CHARACTERS, "characters of regular expressions"),
    ):
        if count > most:
            raise TooLarge(
                f"`{source.path}`: `{key}` holds {count:,} {what}, more than the limit of {most:,}",
                "write names, or one expression for many modules",
            )
    for pattern in patterns:
        _compile(source, key, pattern, form(pattern))


def _plain(value: object) -> str:
    return shown(value) if isinstance(value, str) else brief(value)


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(source: _Source, key: str, default: float) -> float:
    return _as_number(source, key, key, source.raw.get(key, default))


def _as_number(source: _Source, key: str, name: str, value: Any) -> float:
    """`value` if it is a number; `name` is what it is called in the field `key`."""
    # JSON has integers of any length. No real rank or alpha is this large.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise source.error(
            key, f"`{shown(name)}` is {brief(value)}, not a number", "write the number that was used in training"
        )
    return value


def _table(source: _Source, key: str) -> dict[str, float]:
    value = source.raw.get(key) or {}
    if not isinstance(value, dict):
        raise source.error(
            key, f"`{key}` is {brief(value)}, not an object of patterns and numbers", "see PEFT's LoraConfig"
        )
    _compile_all(source, key, [pattern for pattern in value if plain_pattern(pattern) is None], ending)
    return {pattern: _as_number(source, key, pattern, number) for pattern, number in value.items()}


def _targets(source: _Source) -> str | tuple[str, ...] | None:
    value = source.raw.get("target_modules")
    if value is None:
        return None
    if isinstance(value, str):
        _compile(source, "target_modules", value)
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(sorted(set(value)))
    raise source.error(
        "target_modules",
        f"`target_modules` is {brief(value)}, neither a list of names nor an expression",
        "write the list of names that the adapter was trained with",
    )
