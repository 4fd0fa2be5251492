"""The options that limit what one folder may cost. In: a parser, or its options. Out: a `Budget`."""

from __future__ import annotations

import argparse

from lora_probe.files.limits import MEMORY, SECONDS, Budget

LEAST = 1 / 16
"""GiB without which Python itself has no room."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that set it."""
    group = parser.add_argument_group("limits", "for files that others wrote; past a limit a folder is not judged")
    group.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help=f"CPU time for one folder; default: {SECONDS}, and more for large weights",
    )
    group.add_argument(
        "--max-memory",
        type=_gibibytes,
        metavar="GIB",
        help=f"memory for one folder; default: {MEMORY / 2**30:.2f}, and more for large weights",
    )


def _positive(word: str) -> float:
    value = float(word)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return value


def _gibibytes(word: str) -> float:
    value = float(word)
    if not LEAST <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} is not a number from {LEAST}")
    return value


def budget(options: argparse.Namespace) -> Budget:
    """What one folder may cost."""
    memory = options.max_memory
    return Budget(options.timeout, None if memory is None else int(memory * 2**30))
