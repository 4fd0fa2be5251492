"""Rules in Markdown: all of them on one page (`rules/RULES.md`, made by `make rules`), and each by itself for SARIF.

In: rules. Out: Markdown. The source is the plain text of the rule's docstring: paragraphs that may start with a label
and a colon (`Why it matters: ...`), and code in backticks or indented.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_probe.names import in_words
from lora_probe.render.results import RuleList
from lora_probe.rules import Rule, family_of

HEAD = """# Rules

Everything that `lora-probe` reports, by code. `lora-probe rule LP201` prints the page of a rule. `check --select` and
`check --ignore` accept codes, prefixes (`LP2`, `LP2xx`) and names. Codes are never reused. This file is generated from
the rules' docstrings by `make rules`.
"""

_LEAD = re.compile(r"^([A-Z][\w ,-]{2,40}): ")
_MARKUP = re.compile(r"(`[^`]*`|\*\*[^*\n]+\*\*|\*\w[^*\n]*\*)")
"""Text that already is markup: code, and words in asterisks."""
_REFERENCE = re.compile(r"\b([\w.-]+/[\w.-]+)#(\d+)\b")


def rules(result: RuleList) -> str:
    """All rules, with their pages whether `--all` was passed or not."""
    return markdown(result.rules)


def markdown(rules: Sequence[Rule]) -> str:
    """A table of contents by families, then the page of each rule."""
    every = families(rules)
    parts = [HEAD, *_contents(every)]
    for title, members in every.items():
        parts.append(f"## {title}\n")
        parts += [f"### {rule.code} {rule.name}\n\n{page(rule)}" for rule in members]
    return "\n".join(parts)


def families(rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    """The rules by the titles of their families."""
    members: dict[str, list[Rule]] = {}
    for rule in rules:
        members.setdefault(family_of(rule.code).heading, []).append(rule)
    return members


def page(rule: Rule) -> str:
    """One rule without its heading: facts, page and hint."""
    paragraphs = [_paragraph(text.rstrip()) for text in rule.page.strip().split("\n\n")]
    return "\n\n".join([facts(rule), *paragraphs, f"**Hint**: {_escaped(rule.hint)}"]) + "\n"


def facts(rule: Rule) -> str:
    """The rule's severity, its engines and its station of the ledger."""
    if rule.station == "merge":
        return rule.severity
    where = "" if rule.station == "adapter" else f", station {rule.station}"
    return f"{rule.severity}, {in_words(rule.in_engines)}{where}"


def first_sentence(rule: Rule) -> str:
    """What the rule reports."""
    return " ".join(rule.page.partition("\n\n")[0].split())


def _contents(families: dict[str, list[Rule]]) -> Iterable[str]:
    for title, members in families.items():
        yield f"- [{title}](#{_anchor(title)})"
        for rule in members:
            heading = f"{rule.code} {rule.name}"
            yield f"  - [{heading}](#{_anchor(heading)}): {_escaped(first_sentence(rule).rstrip('.'))}"
    yield ""


def _anchor(heading: str) -> str:
    """The anchor that GitHub generates for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _paragraph(text: str) -> str:
    if all(line.startswith("    ") for line in text.splitlines()):
        return text
    return _escaped(_LEAD.sub(r"**\1**: ", text, count=1))


def _escaped(text: str) -> str:
    """Plain text as Markdown: existing markup stays, references become links, and all else is escaped."""
    parts = _MARKUP.split(text)
    for number in range(0, len(parts), 2):
        plain = re.sub(r"([\\<*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", parts[number])
        parts[number] = _REFERENCE.sub(r"[\1#\2](https://github.com/\1/issues/\2)", plain)
    return "".join(parts)
