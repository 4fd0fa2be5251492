"""The smallest parts of all text output: words and lines.

In: strings from untrusted files. Out: rich texts in which nothing from a file acts as markup or as a control character.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.text import Text as RichText

if TYPE_CHECKING:
    from lora_probe.rules import Severity

SEVERITIES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
"""The style of a diagnostic's severity, the worst first."""
SHOWN = 10
"""How many similar lines are printed before the rest is only counted."""
DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
SURROGATES = range(0xD800, 0xE000)
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *DIRECTION, *SURROGATES, 0xFFFE, 0xFFFF), "�")
"""Control characters, line separators, changes of direction and bytes that are not text. None of them is printed."""
LONGEST = 4000
"""How many characters of one string from a file, an answer or a log are printed."""
_LINE = CONTROL | {9: " ", 10: "�"}
_ORDER = re.compile(r":(?=:)|##(?=\[)")


def one_line(content: object) -> str:
    """A string from a file, an answer or a log, safe to print: one line, without control characters, not too long.

    A workflow runner treats `::` at the start of a line, and `##[` anywhere, as a command: a space breaks both up.
    """
    text = str(content)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text) - LONGEST:,} more characters)"
    return _ORDER.sub(r"\g<0> ", text.translate(_LINE))


def size(count: int) -> str:
    """Bytes in MiB with three digits, or in KiB if it is less than one MiB."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def words(content: object, style: str = "") -> RichText:
    """One line of words without markup, cleaned by `one_line`."""
    return RichText(one_line(content), style=style)


def paragraphs(text: str) -> RichText:
    """Several lines of text that is ours."""
    return RichText("\n").join(words(line) for line in text.split("\n"))


def assemble(*parts: str | tuple[str, str]) -> RichText:
    """Words in several styles on one line."""
    whole = RichText()
    for part in parts:
        whole.append_text(words(part) if isinstance(part, str) else words(*part))
    return whole
