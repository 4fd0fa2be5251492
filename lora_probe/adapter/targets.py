"""Which modules and parameters of a base model a config targets.

In: the fields of `adapter_config.json` that name modules. Out: `Targets`, which answers for one name at a time. The
rules mirror PEFT 0.21: `check_target_module_exists` in `peft/tuners/tuners_utils.py`. A config may hold a hundred
thousand names, so plain names are looked up, and only expressions are tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_probe.adapter.pattern_index import ends, is_word, parts
from lora_probe.adapter.saved import names_without_pairs
from lora_probe.files.regexes import Expressions

ALL_LINEAR = "all-linear"
_NOT_IN_ALL_LINEAR = ("lm_head", "embed_tokens", "score", "classifier")
"""Modules that `all-linear` leaves out."""
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


class Targets:
    """The targets of one config. Results for modules are cached."""

    def __init__(self, raw: Mapping[str, Any], modules: str | tuple[str, ...] | None, expressions: Expressions) -> None:
        self._modules, self._expressions = modules, expressions
        self._wanted = frozenset(modules if isinstance(modules, tuple) else ())
        excluded = raw.get("exclude_modules") or ()
        self._excluded: str | frozenset[str] = excluded if isinstance(excluded, str) else frozenset(excluded)
        saved = names_without_pairs(raw)
        self._saved = frozenset(filter(is_word, saved))
        self._saving = [saving(name) for name in saved if not is_word(name)]
        parameters = raw.get("target_parameters") or ()
        self._parameters = frozenset([parameters] if isinstance(parameters, str) else parameters)
        self._parameters_by_module: dict[str, list[str]] = {}
        for parameter in parameters:
            module, _, name = parameter.rpartition(".")
            self._parameters_by_module.setdefault(module, []).append(name)
        layers = raw.get("layers_to_transform")
        self._any_layer = layers is None or layers == []
        self._layers = frozenset([layers] if isinstance(layers, int) else layers or ())
        patterns = raw.get("layers_pattern") or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        self._numbering = [numbering(pattern) for pattern in patterns] or [_ANY_LAYER]
        self._results: dict[str, bool] = {}

    def module(self, name: str) -> bool:
        """Whether PEFT would adapt the module with this name."""
        if name not in self._results:
            self._results[name] = self.parameter(f"{name}.weight") or self._is_module(name)
        return self._results[name]

    def is_named(self, name: str) -> bool:
        """Whether target_modules names the module, whatever the other fields are."""
        if not self._modules:
            return False
        if self._modules == ALL_LINEAR:
            return name.rpartition(".")[2] not in _NOT_IN_ALL_LINEAR
        if isinstance(self._modules, str):
            return self._expressions.fullmatch(self._modules, name, "target_modules") is not None
        return not self._wanted.isdisjoint(ends(name))

    def left_out_by(self, name: str) -> str:
        """The field of the config that keeps PEFT from adapting a module which is not targeted."""
        if not self.is_named(name):
            return "target_modules"
        if self._is_excluded(name):
            return "exclude_modules"
        if self.saves(name):
            return "modules_to_save"
        unnumbered = self._layer_of(name) is None and self._numbering != [_ANY_LAYER]
        return "layers_pattern" if unnumbered else "layers_to_transform"

    def parameter(self, path: str) -> bool:
        """Whether target_parameters names the parameter with this path."""
        return bool(self._parameters) and not self._parameters.isdisjoint(ends(path))

    def parameters_of(self, module: str) -> list[str]:
        """The parameters of `module` that target_parameters names, at most two."""
        # PEFT also accepts a bare `down_proj` (and writes it for `all-linear`): a parameter of `experts`.
        paths = [*filter(None, ends(module)), *([""] if module.rpartition(".")[2] == "experts" else [])]
        named = self._parameters_by_module
        return [name for path in paths if path in named for name in named[path][:2]][:2]

    def _is_module(self, name: str) -> bool:
        if self._is_excluded(name) or self.saves(name) or not self.is_named(name):
            return False
        # An expression and a whole path are targeted whatever the layers are.
        return isinstance(self._modules, str) or name in self._wanted or self._is_in_layers(name)

    def _is_excluded(self, name: str) -> bool:
        """PEFT's rule: a string is a regular expression for the whole name; a list holds names or ends of names."""
        if isinstance(self._excluded, str):
            return self._expressions.fullmatch(self._excluded, name, "exclude_modules") is not None
        return bool(self._excluded) and not self._excluded.isdisjoint(ends(name))

    def saves(self, name: str) -> bool:
        """Whether modules_to_save names the module, or a module that contains it."""
        if self._saved and not self._saved.isdisjoint(parts(name)):
            return True
        return any(self._expressions.match(expression, name, "modules_to_save") for expression in self._saving)

    def _is_in_layers(self, name: str) -> bool:
        return self._any_layer or self._layer_of(name) in self._layers

    def _layer_of(self, name: str) -> int | None:
        """The layer number in a path, where layers_pattern states that it is."""
        for expression in self._numbering:
            # Python refuses to convert numbers with thousands of digits.
            match = self._expressions.match(expression, name, "layers_pattern")
            if match and len(match["idx"]) < 20:
                return int(match["idx"])
        return None


def saving(name: str) -> str:
    """The expression that PEFT uses to match a name of modules_to_save against a path."""
    return rf"(^|.*\.){name}($|\..*)"


def numbering(layers: str) -> str:
    """The expression that PEFT uses to find the layer number after a name of layers_pattern."""
    return rf"(?:^|.*?\.){layers}\.(?P<idx>\d+)\."
