"""BD-LoRA (`use_bdlora`): which modules have an A or a B that is block-diagonal. Only its blocks are stored.

In: a field of `adapter_config.json`. Out: the numbers of blocks for a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELD = "use_bdlora"
MOST_WORDS = 1000
"""The most words of the field. Real ones name a handful of projections."""


@dataclass(frozen=True)
class Blocks:
    """The words of modules whose A, and whose B, has `count` blocks. `strict`: every module must have one of them."""

    of_a: tuple[str, ...] = ()
    of_b: tuple[str, ...] = ()
    count: int = 1
    strict: bool = False

    def of(self, module: str) -> tuple[int, int]:
        """The numbers of blocks of A and of B."""
        a, b = self._words(module)
        # PEFT refuses a module that is in both lists.
        return (1, 1) if a and b else (self.count if a else 1, self.count if b else 1)

    def refused(self, module: str) -> str | None:
        """Why PEFT refuses the words for a module that is adapted; None if it does not."""
        a, b = self._words(module)
        if a and b:
            return "a word of target_modules_bd_a and one of target_modules_bd_b"
        return "no word of target_modules_bd_a or target_modules_bd_b" if self.strict and not (a or b) else None

    def _words(self, module: str) -> tuple[bool, bool]:
        # As in PEFT, a word is meant wherever it is in the module's path.
        return any(word in module for word in self.of_a), any(word in module for word in self.of_b)


def blocks_in(raw: Mapping[str, Any]) -> Blocks | None:
    """The blocks that a config asks for; None if PEFT cannot read them either."""
    value = raw.get(FIELD)
    if not value:
        return Blocks()
    if not isinstance(value, dict):
        return None
    of_a, of_b = (value.get(f"target_modules_bd_{half}") or [] for half in "ab")
    count = value.get("nblocks", 1)
    lists = all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in (of_a, of_b))
    if not lists or len(of_a) + len(of_b) > MOST_WORDS or isinstance(count, bool) or not isinstance(count, int):
        return None
    return Blocks(tuple(of_a), tuple(of_b), count, bool(value.get("match_strict", True))) if count >= 1 else None
