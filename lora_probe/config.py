"""What `adapter_config.json` says: `AdapterConfig`.

In: the file of an adapter folder. Out: its fields, checked for kind, and the lines they stand on; the rank and the
scaling of a module (patterns, rsLoRA); which modules of a base it targets. The rules mirror PEFT 0.21:
`check_target_module_exists` in `peft/tuners/tuners_utils.py` and `get_pattern_key` in `peft/utils/other.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_probe.errors import NotLora, ProbeError, UnreadableFile
from lora_probe.files import brief, impostor, is_text, opened, shown
from lora_probe.foreign import foreign
from lora_probe.keys import top_level
from lora_probe.patterns import compiles, fullmatch, match

MAX_CONFIG = 10_000_000
"""Bytes; real ones have about a thousand."""
MAX_PATTERN = 100_000
"""Characters of one regular expression: compiling takes time and memory."""

PEFT_DEFAULT_RANK = 8
PEFT_DEFAULT_ALPHA = 8

VARIANTS = {
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "lora_bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "target_parameters",
    "layers_to_transform": "layers_to_transform",
    "exclude_modules": "exclude_modules",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Fields that make an adapter more than plain LoRA when they hold a value, and the name people know them by."""


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
    """Top-level key: the line, from 1, on which it stands last. That one counts, for Python's json as well."""
    repeated: tuple[str, ...] = ()
    """Top-level keys that stand in the file more than once."""

    def base_or(self, model: str | None) -> str:
        """`model` if one is given, else the base that the config names.

        Raises:
            ProbeError: neither is there.
        """
        name = model or self.base_model
        if name is None:
            raise ProbeError(f"`{self.path}` names no base model", "give its folder or id with --model")
        return name

    @property
    def variants(self) -> tuple[str, ...]:
        """What makes it more than plain LoRA, in the words of PEFT's documentation."""
        found = [word for key, word in VARIANTS.items() if self.raw.get(key)]
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init != "gaussian":
            found.append(f"init {init}")
        if self.raw.get("bias", "none") != "none":
            found.append(f"bias {_plain(self.raw['bias'])}")
        return tuple(found)

    @property
    def scaling(self) -> float:
        """The scaling of every module that no pattern names: `alpha / r`, with rsLoRA `alpha / sqrt(r)`."""
        return self._scaling(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to `module` (`rank_pattern` first, then `r`)."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor `s` of `s·B·A` for `module`, as PEFT and vLLM >= 0.32 compute it from the config alone."""
        return self._scaling(self.rank_of(module), _match(self.alpha_pattern, module, self.alpha))

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targeted(self, names: Iterable[str]) -> list[str]:
        """Those of `names` (modules of a base) that PEFT would give an adapter for this config."""
        return [name for name in names if self._targets(name)]

    def targets_parameter(self, parameter: str) -> bool:
        """Whether target_parameters names `parameter`, the path of a weight (`model.layers.0.mlp.gate.weight`)."""
        wanted = self.raw.get("target_parameters") or ()
        return any(
            parameter == name or parameter.endswith(f".{name}")
            for name in ([wanted] if isinstance(wanted, str) else wanted)
        )

    def _targets(self, name: str) -> bool:
        return self.targets_parameter(f"{name}.weight") or self._targets_module(name)

    def _targets_module(self, name: str) -> bool:
        excluded = self.raw.get("exclude_modules")
        if excluded and _names(excluded, name):
            return False
        saved = self.raw.get("modules_to_save") or ()
        if any(match(rf"(^|.*\.){part}($|\..*)", name) for part in saved):
            return False
        if self.target_modules is None or self.target_modules == ():
            return False
        if self.target_modules == "all-linear":
            return name.rpartition(".")[2] not in ("lm_head", "embed_tokens", "score", "classifier")
        if isinstance(self.target_modules, str):
            return fullmatch(self.target_modules, name) is not None
        # A whole path is meant whatever the layers are.
        return name in self._wanted or (_names(self._wanted, name) and self._in_layers(name))

    @cached_property
    def _wanted(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    def _in_layers(self, name: str) -> bool:
        wanted = self.raw.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        patterns = self.raw.get("layers_pattern")
        if isinstance(patterns, str):
            patterns = [patterns] if patterns else None
        expressions = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or ()]
        for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            # Python converts no number of thousands of digits.
            if (found := match(expression, name)) and len(found["idx"]) < 20:
                layer = int(found["idx"])
                return layer == wanted if isinstance(wanted, int) else layer in wanted
        return False


def _names(targets: str | Collection[str], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their ends."""
    if isinstance(targets, str):
        return fullmatch(targets, name) is not None
    return any(end in targets for end in ends(name))


def ends(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = path.split(".")
    for begin in range(len(parts)):
        yield ".".join(parts[begin:])


def _match(patterns: Mapping[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if at_end(pattern, module):
            return float(value)
    return default


def at_end(pattern: str, module: str) -> bool:
    """PEFT's rule for patterns (`get_pattern_key`): the expression matches an end of the path, from a dot on.

    Configs may have a whole path for each of hundreds of modules, so plain names are compared without an expression; a
    dot in one stands for any character, as it does in an expression.
    """
    if not _PLAIN.fullmatch(pattern):
        return match(rf"(.*\.)?({pattern})$", module) is not None
    begin = len(module) - len(pattern)
    if begin < 0 or (begin and module[begin - 1] != "."):
        return False
    end = module[begin:]
    return end == pattern or all(one in (".", other) for one, other in zip(pattern, end, strict=True))


_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


def open_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        NotLora: it is the config of something else.
        UnreadableFile: it is missing, not JSON, or a field is of the wrong kind.
    """
    text = read_text(path)
    raw = parsed(path, text)
    if found := foreign(raw):
        raise NotLora(f"`{path}` {found[0]}", found[1])
    if _HALF.search(text) and not is_text(json.dumps(raw, ensure_ascii=False)):
        raise UnreadableFile(
            f"`{path}` holds half of a surrogate pair (\\ud800 to \\udfff), which is no text",
            "write the characters out",
        )
    standing = top_level(text)
    rank = _number(path, raw, "r", PEFT_DEFAULT_RANK)
    if rank != int(rank) or rank < 1:
        raise UnreadableFile(
            f"`{path}`: `r` is {brief(raw['r'])}, a rank is a whole number from 1",
            "write the rank that the adapter was trained with: the first axis of its lora_A",
        )
    ranks = _table(path, raw, "rank_pattern")
    if any(value != int(value) or value < 1 for value in ranks.values()):
        raise UnreadableFile(
            f"`{path}`: `rank_pattern` holds a value that is no rank: {brief(ranks)}",
            "a rank is a whole number from 1",
        )
    return AdapterConfig(
        path=path,
        base_model=_text(raw.get("base_model_name_or_path")),
        peft_version=_text(raw.get("peft_version")),
        rank=int(rank),
        alpha=_number(path, raw, "lora_alpha", PEFT_DEFAULT_ALPHA),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern={key: int(value) for key, value in ranks.items()},
        alpha_pattern=_table(path, raw, "alpha_pattern"),
        target_modules=_targets(path, raw),
        raw=_checked(path, raw),
        lines=dict(standing),
        repeated=tuple(key for key, count in Counter(key for key, _ in standing).items() if count > 1),
    )


def _checked(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The other fields that decide which modules are meant: each of a kind that the rest can rely on."""
    for key, (kinds, what) in _KINDS.items():
        value = raw.get(key)
        items = value if isinstance(value, list) else []
        plain = tuple(kind for kind in kinds if kind is not list)
        if value is not None and (not isinstance(value, kinds) or not all(isinstance(i, plain) for i in items)):
            raise UnreadableFile(f"`{path}`: `{key}` is {brief(value)}, not {what}", "see PEFT's LoraConfig")
    excluded = raw.get("exclude_modules")
    if isinstance(excluded, str):
        _compile(path, "exclude_modules", excluded)
    for part in raw.get("modules_to_save") or ():
        _compile(path, "modules_to_save", part, rf"(^|.*\.){part}($|\..*)")
    layers = raw.get("layers_pattern") or ()
    for part in [layers] if isinstance(layers, str) else layers:
        _compile(path, "layers_pattern", part, rf"(?:^|.*?\.){part}\.(?P<idx>\d+)\.")
    return raw


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "exclude_modules": ((str, list), "a list of names or an expression"),
    "modules_to_save": ((list, str), "a list of names"),
    "layers_to_transform": ((int, list), "a layer number or a list of them"),
    "layers_pattern": ((str, list), "a name or a list of names"),
    "target_parameters": ((list, str), "a list of names"),
}


def _compile(path: Path, key: str, pattern: str, *forms: str) -> None:
    """Compile an expression as it stands and in the forms in which it will be used (PEFT wraps it)."""
    try:
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters")
        for form in (pattern, *forms):
            re.compile(form)
            compiles(form)
    # A repetition too large for re is an OverflowError, one nested too deep a RecursionError.
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UnreadableFile(
            f"`{path}`: {brief(pattern)} in `{key}` is a broken regular expression: {why}",
            "PEFT matches module names with Python's re; write an expression that it compiles",
        ) from error


def _plain(value: object) -> str:
    return value if isinstance(value, str) else brief(value)


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for.

    Raises:
        UnreadableFile: missing, too large, not JSON (with line and column), or not an object.
    """
    return parsed(path, read_text(path, limit))


def read_text(path: Path, limit: int = MAX_CONFIG) -> str:
    """The text of a JSON file, at most `limit` bytes of it. Raises as `read_json` does."""
    with opened(path) as (file, size):
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise UnreadableFile(
            f"`{path}` has {size} bytes, more than {limit}; no config is so large", "is it another file under its name?"
        )
    if wrong := impostor(data[:64], "JSON"):
        raise UnreadableFile(f"`{path}` {wrong[0]}", wrong[1])
    if data.startswith(b"\xef\xbb\xbf"):
        raise UnreadableFile(
            f"`{path}` begins with a byte order mark (UTF-8 with BOM), and PEFT's and vLLM's json refuses it",
            f"save it as UTF-8 without BOM: sed -i '1s/^\\xEF\\xBB\\xBF//' {path.name}",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start})"
        raise UnreadableFile(
            f"`{path}` is not valid JSON: it is {kind}, and JSON is UTF-8", "save it as UTF-8"
        ) from error


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises as `read_json` does; `path` is for the words."""
    again = "copy it again from where it was saved, or mend it in an editor"
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"in line {error.lineno}, column {error.colno}"
        raise UnreadableFile(f"`{path}` is not valid JSON: {error.msg} {where}", again) from error
    except (RecursionError, ValueError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UnreadableFile(f"`{path}` is not valid JSON: {why}", again) from error
    except MemoryError as error:
        raise UnreadableFile(f"`{path}` is too large for the memory here", again) from error
    if not isinstance(raw, dict):
        raise UnreadableFile(f"`{path}` holds a JSON {type(raw).__name__}, not an object", again)
    return raw


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(path: Path, raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    # JSON has integers of any length; beyond this no rank and no alpha was ever meant.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise UnreadableFile(
            f"`{path}`: `{shown(key)}` is {brief(value)}, not a number", f"write the number that `{shown(key)}` had"
        )
    return value


def _table(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, float]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UnreadableFile(
            f"`{path}`: `{key}` is {brief(value)}, not an object of patterns and numbers", "see PEFT's LoraConfig"
        )
    for pattern in value:
        _compile(path, key, pattern, rf"(.*\.)?({pattern})$")
    return {pattern: _number(path, value, pattern, 0) for pattern in value}


def _targets(path: Path, raw: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    value = raw.get("target_modules")
    if value is None:
        return None
    if isinstance(value, str):
        _compile(path, "target_modules", value)
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(sorted(set(value)))
    raise UnreadableFile(
        f"`{path}`: `target_modules` is {brief(value)}, neither a list of names nor an expression",
        "write the list of names that the adapter was trained with",
    )
