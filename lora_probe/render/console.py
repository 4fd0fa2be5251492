"""Where everything is printed: data on standard output, all else on standard error.

In: renderables, dictionaries, sentences. Out: nothing. A pipe that its reader closed is not an error. Before a line on
standard error, standard output is flushed, so that both are in order if they go to one file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, Group
from rich.protocol import is_renderable
from rich.text import Text

from lora_probe.files.limits import step
from lora_probe.render.cells import SURROGATES, assemble, words

Detail = Literal["quiet", "normal", "verbose"]
"""How much is printed: the answer alone, what matters, everything."""

NARROWEST, WIDEST = 20, 1000
"""Columns of a terminal that a person can read. A table of less is empty, and every line of more is memory."""


_detail: Detail = "normal"


def set_detail(detail: Detail) -> None:
    """Decide how much this process prints, as its command line asks."""
    global _detail
    _detail = detail


def detail() -> Detail:
    """How much this process prints."""
    return _detail


def heed_columns() -> None:
    """Keep COLUMNS from making output unreadable: rich by itself would use any number, and print nothing at 0."""
    try:
        columns = int(os.environ.get("COLUMNS", "0"))
    except ValueError:
        columns = 0
    if columns < NARROWEST:
        os.environ.pop("COLUMNS", None)
    elif columns > WIDEST:
        os.environ["COLUMNS"] = str(WIDEST)


def complain(message: str, hint: str = "") -> None:
    """Print an error, and what to do about it."""
    _on_stderr(assemble(("error:", "bold red"), f" {message}"))
    for line in filter(None, hint.split("\n")):
        _on_stderr(assemble(("hint:", "cyan"), f" {line}"))


def note(text: str) -> None:
    """Print a line on standard error, unless only the answer is wanted."""
    if _detail != "quiet":
        _on_stderr(words(text))


def remarks(texts: Iterable[str]) -> None:
    """Print what was noticed beside the result, so that standard output holds the result alone."""
    for text in texts if _detail != "quiet" else ():
        _on_stderr(assemble(("note:", "cyan"), f" {text}"))


def hint(text: str) -> None:
    """Print what to do next: a command, which is never broken into lines, so that it can be copied."""
    if _detail != "quiet":
        _on_stderr(assemble(("hint:", "cyan"), f" {text}"), command=True)


def _on_stderr(text: Text, command: bool = False) -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    heed_columns()
    console = Console(stderr=True)
    whole = command or not console.is_terminal
    # If standard error cannot be written, the exit status is all that is left.
    with suppress(OSError):
        console.print(text if whole else wrapped(text, console.width), soft_wrap=True, highlight=False)


class _Output(Console):
    """Standard output. A closed pipe (`| head`) does not change the exit status; rich by itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        discard_output()


def discard_output() -> None:
    """Send the rest of standard output nowhere: its reader has gone, or it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit(content: Any) -> None:
    """Print what a format returns: a text, lines, a dictionary as JSON, or a rich renderable."""
    if isinstance(content, dict):
        dump(content)
    elif isinstance(content, str):
        write([content])
    elif is_renderable(content):
        show(content)
    else:
        write(content)


def show(renderable: Any) -> None:
    """Print for a person. Tables fit the width. Sentences are broken at spaces, in terminals only; paths and names are
    never broken. Lines in a pipe do not end in spaces."""
    step("drawing the output")
    console = output()
    waiting = [renderable]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Group):
            waiting[:0] = part.renderables
        elif console.is_terminal:
            console.print(
                wrapped(part, console.width) if isinstance(part, Text) else part, soft_wrap=_whole(part), crop=False
            )
        else:
            with console.capture() as capture:
                console.print(part, soft_wrap=_whole(part), crop=False)
            write([_BLANKS.sub("", capture.get()).removesuffix("\n")])


def output() -> Console:
    """The console of standard output. A pipe is wide."""
    console = _Output(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


_BLANKS = re.compile(r" +$", re.MULTILINE)


def _whole(part: Any) -> bool:
    return isinstance(part, Text)


def wrapped(sentences: Text, width: int) -> Text:
    """Lines broken at spaces to fit the width. A wider word stays whole, and continued lines keep the indentation."""
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
    """Print an object as JSON."""
    write([as_json(data)])


def as_json(data: dict[str, Any]) -> str:
    """JSON in which every character is printable, and in the encoding of standard output. What moves the cursor,
    changes the direction of text or starts a command of a workflow runner is escaped, so that values stay the same."""
    step("writing JSON")
    text = json.dumps(_bounded(data), ensure_ascii=False, indent=2, allow_nan=False)
    return _UNPRINTABLE.sub(lambda match: "".join(map(_escape, match[0])), text)


_UNPRINTABLE = re.compile(r"[^\n -~]+|##(?=\[)")
LONGEST = 1_000_000
"""The longest string in JSON. Answers can be that long; values in a config are not."""


def _escape(character: str) -> str:
    if character == "#":
        return "\\u0023"
    return character if character.isprintable() and _encodable(character) else json.dumps(character)[1:-1]


def _encodable(character: str) -> bool:
    try:
        character.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bounded(value: Any) -> Any:
    """The same value with strings cut to `LONGEST`."""
    if isinstance(value, str):
        more = len(value) - LONGEST
        return value if more <= 0 else f"{value[:LONGEST]}... ({more:,} more characters)"
    if isinstance(value, dict):
        return {_bounded(key): _bounded(inner) for key, inner in value.items()}
    return [_bounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def write(lines: Iterable[str]) -> None:
    """Print lines for programs. Bytes in names that are not UTF-8 become a replacement character."""
    try:
        for line in lines:
            print(line.translate(dict.fromkeys(SURROGATES, "�")))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
