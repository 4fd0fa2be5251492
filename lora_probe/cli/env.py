"""`lora-probe env`: the versions for a bug report. In: nothing. Out: versions on standard output."""

from __future__ import annotations

import argparse

from lora_probe.cli.ending import CLEAN
from lora_probe.cli.options import Command
from lora_probe.render.formats import present


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None but `--format`."""


def run(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import versions

    present("env", options.format, versions())
    return CLEAN


COMMAND = Command(
    "env",
    "print the versions to include in a bug report",
    "  lora-probe env\n  lora-probe env --format json | jq .versions",
    add_arguments,
    run,
)
