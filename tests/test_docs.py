"""Statements of the README about the repository are true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import lora_probe
from lora_probe.cli.main import parser_of_all

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).exists())


def test_the_file_map_is_the_tree() -> None:
    block = CONTRIBUTING.split("## The files")[1].split("```")[1]
    mapped = {line.split()[0].rstrip("/") for line in block.splitlines() if line.startswith("  ")}
    listed = {entry.name for entry in (ROOT / "lora_probe").iterdir()}
    assert mapped == listed - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    for line in block.splitlines():
        if line and not line.startswith(" "):
            assert (ROOT / line.split()[0]).is_dir(), line


def test_commands_and_options_in_the_readme_exist() -> None:
    help_of = {
        name: parser.format_help()
        for action in parser_of_all()._subparsers._group_actions  # type: ignore[union-attr]
        for name, parser in action.choices.items()  # type: ignore[union-attr]
    }
    blocks = "\n".join(README.split("```")[1::2])
    used = re.findall(r"^(?:\$ )?lora-probe ([a-z]+)(.*)$", blocks, re.MULTILINE)
    assert {command for command, _ in used} == set(help_of)
    for command, rest in used:
        for option in re.findall(r"(?<=\s)(--[a-z-]+)", rest.split(" -- ")[0]):
            assert option in help_of[command], (command, option)


def test_public_names_are_in_the_readme() -> None:
    for name in lora_probe.__all__:
        assert getattr(lora_probe, name) is not None
        if not name.startswith("__"):
            # Functions are called; the types of their results are named.
            assert f"lora_probe.{name}(" in README or f"`{name}`" in README, name


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)`", README)) | set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_no_registry_is_named() -> None:
    for name in tracked():
        text = (ROOT / name).read_bytes()
        assert not re.search(rb"(pypi|pythonhosted|download\.pytorch)\.org", text), name
