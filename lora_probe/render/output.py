"""Where everything is printed: data on standard output, all else on standard error.

In: renderables, dictionaries, sentences. Out: nothing; that the reader of a pipe has gone is no error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from lora_probe.render.cells import SURROGATES
from lora_probe.render.progress import escaped


def complain(message: str, hint: str = "") -> None:
    """An error, and what to do about it."""
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/] {escaped(message)}", soft_wrap=True, highlight=False)
    for line in filter(None, hint.split("\n")):
        console.print(f"[cyan]hint:[/] {escaped(line)}", soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """A line beside the data."""
    Console(stderr=True).print(escaped(text), soft_wrap=True, highlight=False)


def hint(text: str) -> None:
    """What to do next."""
    Console(stderr=True).print(f"[cyan]hint:[/] {escaped(text)}", soft_wrap=True, highlight=False)


class _Output(Console):
    """Standard output. That its reader has gone (`| head`) changes no exit status; rich by itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        _reader_gone()


def _reader_gone() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(renderable: Any) -> None:
    """Print for a person. Sentences are never broken (a terminal wraps them itself), tables fit their width."""
    console = _Output(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    waiting = [renderable]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Group):
            waiting[:0] = part.renderables
        else:
            console.print(part, soft_wrap=isinstance(part, Text))


def dump(data: dict[str, Any]) -> None:
    """Print for a program."""
    write([json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False)])


def write(lines: Iterable[str]) -> None:
    """Lines for programs. Bytes in names that are no UTF-8 are shown as such."""
    try:
        for line in lines:
            print(line.translate(dict.fromkeys(SURROGATES, "�")))
        sys.stdout.flush()
    except BrokenPipeError:
        _reader_gone()
