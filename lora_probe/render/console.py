"""Where everything is printed: data on standard output, all else on standard error.

In: renderables, dictionaries, sentences. Out: nothing; that the reader of a pipe has gone is no error. What was printed
before is written out before anything is said, so that both streams in one file are in their order.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.text import Text

from lora_probe.files.limits import step
from lora_probe.render.cells import SURROGATES, assemble, words


def complain(message: str, hint: str = "") -> None:
    """An error, and what to do about it."""
    _beside(assemble(("error:", "bold red"), f" {message}"))
    for line in filter(None, hint.split("\n")):
        _beside(assemble(("hint:", "cyan"), f" {line}"))


def say(text: str) -> None:
    """A line beside the data."""
    _beside(words(text))


def hint(text: str) -> None:
    """What to do next: a command, which is to be copied and never broken."""
    _beside(assemble(("hint:", "cyan"), f" {text}"), command=True)


def _beside(text: Text, command: bool = False) -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    console = Console(stderr=True)
    whole = command or not console.is_terminal
    # Where standard error cannot be written to, nobody can be told; the exit status still says it.
    with suppress(OSError):
        console.print(text if whole else wrapped(text, console.width), soft_wrap=True, highlight=False)


class _Output(Console):
    """Standard output. That its reader has gone (`| head`) changes no exit status; rich by itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        discard_output()


def discard_output() -> None:
    """Nobody reads standard output any more, or nothing can be written to it: the rest goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(renderable: Any) -> None:
    """Print for a person: tables fit the width. Sentences are broken at spaces in a terminal and nowhere else; a path
    or a name is never broken. No line in a pipe ends in blanks."""
    step("drawing what is shown")
    console = _Output(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    waiting = [renderable]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Group):
            waiting[:0] = part.renderables
        elif console.is_terminal:
            console.print(wrapped(part, console.width) if isinstance(part, Text) else part, soft_wrap=_whole(part))
        else:
            with console.capture() as capture:
                console.print(part, soft_wrap=_whole(part))
            write([_BLANKS.sub("", capture.get()).removesuffix("\n")])


_BLANKS = re.compile(r" +$", re.MULTILINE)


def _whole(part: Any) -> bool:
    return isinstance(part, Text)


def wrapped(sentences: Text, width: int) -> Text:
    """Lines broken at spaces so that they fit; a wider word stays whole. What goes on is as far in as its line."""
    lines = [part for line in sentences.split("\n", allow_blank=True) for part in _broken(line, width)]
    return Text("\n").join(lines)


def _broken(line: Text, width: int) -> Iterable[Text]:
    indent = len(line.plain) - len(line.plain.lstrip(" "))
    breaks, used = [], 0
    for word in re.finditer("[^ ]+ *", line.plain):
        if used and indent + used + cell_len(word[0].rstrip()) > width:
            breaks.append(word.start())
            used = 0
        used += cell_len(word[0])
    for number, part in enumerate(line.divide(breaks)):
        part.rstrip()
        yield Text(" " * indent) + part if number else part


def dump(data: dict[str, Any]) -> None:
    """Print for a program."""
    write([as_json(data)])


def as_json(data: dict[str, Any]) -> str:
    """JSON in which every character is printable. What moves a cursor, changes the direction of text or is a command to
    a workflow's runner is written as an escape, so that no value changes."""
    step("writing JSON")
    text = json.dumps(_bounded(data), ensure_ascii=False, indent=2, allow_nan=False)
    return _UNPRINTABLE.sub(lambda match: "".join(map(_escape, match[0])), text)


_UNPRINTABLE = re.compile(r"[^\n -~]+|##(?=\[)")
LONGEST = 1_000_000
"""Characters of a string in JSON. Answers are that long, values of a config are not."""


def _escape(character: str) -> str:
    if character == "#":
        return "\\u0023"
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _bounded(value: Any) -> Any:
    """The same without strings that nobody reads to the end."""
    if isinstance(value, str):
        more = len(value) - LONGEST
        return value if more <= 0 else f"{value[:LONGEST]}... ({more:,} more characters)"
    if isinstance(value, dict):
        return {_bounded(key): _bounded(inner) for key, inner in value.items()}
    return [_bounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def write(lines: Iterable[str]) -> None:
    """Lines for programs, and JSON. Bytes in names that are no UTF-8 are shown as such."""
    try:
        for line in lines:
            print(line.translate(dict.fromkeys(SURROGATES, "�")))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
