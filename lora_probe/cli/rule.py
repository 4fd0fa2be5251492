"""`lora-probe rule`: the rules and their pages. In: options. Out: rules on standard output, and the exit status."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN
from lora_probe.cli.options import Command
from lora_probe.errors import ProbeError
from lora_probe.render.formats import present
from lora_probe.render.results import RuleList

if TYPE_CHECKING:
    from lora_probe.rules import Rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="code or name of a rule, or a family such as LP7xx; default: all rules"
    )
    parser.add_argument("--all", action="store_true", help="print the page of every rule instead of one line per rule")


def run(options: argparse.Namespace) -> int:
    from lora_probe.rules import all_rules

    rules = list(all_rules().values()) if options.code is None else _chosen(options.code)
    present("rule", options.format, RuleList(rules, options.all))
    return CLEAN


def _chosen(word: str) -> list[Rule]:
    """The rules of a code, a family (`LP7` or `LP7xx`) or a name."""
    from lora_probe.rules import all_rules
    from lora_probe.rules.codes import meant, numbers_of, suggestion

    rules = [all_rules()[code] for code in meant(word, all_rules())]
    if not rules:
        raise ProbeError(
            f"unknown rule `{word}`{suggestion(word, all_rules())}",
            f"codes: {numbers_of(all_rules())}; `lora-probe rule` lists all rules",
        )
    return rules


COMMAND = Command(
    "rule",
    "explain a rule, or list all rules",
    "  lora-probe rule\n  lora-probe rule LP201\n  lora-probe rule LP2xx --all\n"
    "  lora-probe rule --all --format markdown > RULES.md",
    add_arguments,
    run,
)
