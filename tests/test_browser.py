"""A page in a real browser: pointing, keys, the switch, the filter, the copy button, injection, accessibility.

Needs Chromium (`apt-get install chromium`); `make test-browser` runs these tests alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from safetensors.numpy import load_file, save_file
from served import A, B, mixed
from test_compare_runs import record
from test_pages import INJECTION, adapter_of

pytestmark = pytest.mark.browser
DEEP = [f"model.layers.{layer}.self_attn.{name}" for layer in range(20) for name in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path is not None, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """An open page, and what its console said."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.said.append(request.url) if request.url[:5] != "file:" else None)
        self.page.goto(file.as_uri())


def written(folder: Path, capsys: Any, *words: object) -> Path:
    """The page of a command, in a file."""
    status, out, error = call(*words, "--format", "html", capsys=capsys)
    assert status in (0, 1), error
    file = folder / "page.html"
    file.write_text(out, encoding="utf-8")
    return file


def test_point_switch_and_move(chromium: Any, tmp_path: Path, capsys: Any) -> None:
    visit = Visit(chromium, written(tmp_path, capsys, "inspect", adapter_of(tmp_path / "a", DEEP), "--norms"))
    heat = visit.page.locator("section.heat").first
    told = heat.locator(".told")
    cell = heat.locator("tbody tr").nth(3).locator("td").nth(1)
    cell.hover()
    assert told.text_content().startswith("layer 3 v_proj: ‖ΔW‖ ")
    assert "effective rank" in told.text_content()
    before = cell.text_content()
    heat.get_by_label("effective rank", exact=True).check()
    assert cell.text_content() != before
    assert heat.locator("table").get_attribute("aria-label").endswith(": effective rank")
    cell.focus()
    visit.page.keyboard.press("ArrowDown")
    assert told.text_content().startswith("layer 4 v_proj: ")
    visit.page.keyboard.press("ArrowLeft")
    assert told.text_content().startswith("layer 4 q_proj: ")
    assert heat.locator("td[tabindex='0']").count() == 1
    assert visit.said == []


def test_filter_and_copy(chromium: Any, tmp_path: Path, capsys: Any) -> None:
    folder = adapter_of(tmp_path / "a", DEEP)
    other = adapter_of(tmp_path / "b", DEEP)
    path = other / "adapter_model.safetensors"
    save_file({name: values * np.float32(2) for name, values in load_file(path).items()}, path)
    file = written(tmp_path, capsys, "inspect", folder, other)
    visit = Visit(chromium, file)
    table = visit.page.locator("section.table").filter(has=visit.page.locator("input[type=search]")).first
    table.locator("input").fill("layer 7 ")
    assert table.locator("tbody tr:visible").count() == 2
    assert table.locator(".count").text_content() == "2 of 40 rows"
    visit.page.locator("#copy").click()
    visit.page.wait_for_function("document.getElementById('copied').textContent !== ''")
    markdown = visit.page.locator("#markdown").input_value()
    assert markdown.startswith("## ")
    assert "| module |" in markdown
    assert visit.said == []


def test_names_that_attack_do_nothing(chromium: Any, tmp_path: Path, capsys: Any) -> None:
    folder = adapter_of(tmp_path / "a", [f"model.layers.{n}.{INJECTION}.q_proj" for n in range(3)])
    trace = record(tmp_path / "run", texts={"forced_text": INJECTION, "generated_text": INJECTION}, forced=1)
    run = json.loads((trace / "run.json").read_text())
    run["spec"]["prompts"] = [{"text": INJECTION, "ids": []}]
    (trace / "run.json").write_text(json.dumps(run))
    for words in (("inspect", folder, "--norms"), ("inspect", folder, folder), ("check", folder), ("show", trace)):
        visit = Visit(chromium, written(tmp_path, capsys, *words))
        for row in visit.page.locator("section.heat td").all():
            row.hover()
        visit.page.locator("#copy").click()
        assert visit.page.evaluate("document.images.length + document.links.length") == 0
        assert visit.page.evaluate("document.scripts.length") == 1 + visit.page.locator("section.heat").count()
        assert visit.said == [], words


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_accessible_at_any_width(scheme: Any, width: int, chromium: Any, tmp_path: Path, capsys: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    folder = adapter_of(tmp_path / "a", DEEP)
    trace, answered = mixed(tmp_path / "run", A, B), record(tmp_path / "answered")
    commands = (("inspect", folder, "--norms"), ("inspect", folder, folder), ("check", folder), ("show", trace))
    for words in (*commands, ("compare", answered, answered)):
        file = written(tmp_path, capsys, *words)
        visit = Visit(chromium, file, color_scheme=scheme, viewport={"width": width, "height": 800})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width, words
        violations = Axe().run(visit.page).response["violations"]
        assert [(violation["id"], violation["nodes"][0]["html"]) for violation in violations] == [], words
