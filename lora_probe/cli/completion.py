"""Completion for bash, zsh, fish and tcsh, made by shtab from the parser itself.

In: the parser of all commands, a shell. Out: a script for that shell.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh")
FOLDERS = ("CKPT", "OTHER", "BASE", "RUN.lptrace", "OTHER.lptrace", "REFERENCE", "CANDIDATE", "MERGED", "FIXED")
"""Arguments that are folders, by their names in the help."""


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: prints the script and ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        import shtab

        from lora_probe.render.console import write

        for each in _parsers(parser):
            for action in each._actions:
                if action.metavar in FOLDERS:
                    action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        write([shtab.complete(parser, shell=str(values)).rstrip()])
        parser.exit(0)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()
