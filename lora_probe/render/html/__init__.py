"""A document as one self-contained page, or as a part of a notebook.

In: a `Document`. Out: HTML. Every string is escaped by the template engine; the page loads nothing, and its policy lets
no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lora_probe.render.cells import one_line
from lora_probe.render.document import Curves, Document, Heat, Measure, Section
from lora_probe.render.document_markdown import markdown
from lora_probe.render.towers import Cell, extent

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CELLS = 6_000
"""Cells of a heat map, and rows of a table, that a page shows."""
WIDTH, HEIGHT = 96, 40
"""The size of a small picture, in pixels."""


def page(document: Document) -> str:
    """A whole page: `lora-probe show run.lptrace --format html > run.html`."""
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().get_template("page.html")
    text = template.render(
        document=document, script=script, digest=digest, style=_file("style.css"), markdown=markdown(document)
    )
    # As references, all characters survive any encoding of standard output. The scripts are ASCII.
    return text.encode("ascii", "xmlcharrefreplace").decode()


def fragment(document: Document) -> str:
    """The parts of the page for a cell of a notebook: without a script, with styles of their own."""
    return _environment().get_template("fragment.html").render(document=document, style=_file("style.css"))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora_probe.render.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters |= {"kind": _kind, "shades": shades, "points": points, "top": top}
    environment.filters |= {"as_data": as_data, "prose": prose}
    environment.globals["most"] = MOST_CELLS
    return environment


def _file(name: str) -> Any:
    """A file of this package, as text that is ours."""
    from markupsafe import Markup

    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


def _clean(value: Any) -> Any:
    """What a template prints: strings from files without control characters, markup of ours as it is."""
    from markupsafe import Markup

    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(map(one_line, value.split("\n")))


def prose(text: str) -> Any:
    """A sentence in which words between backticks are code."""
    from markupsafe import Markup

    parts = [Markup.escape(part) for part in _clean(text).split("`")]
    if len(parts) % 2 == 0:
        return Markup("`").join(parts)
    tagged = (Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in enumerate(parts))
    return Markup("").join(tagged)


def _kind(section: Section) -> str:
    return type(section).__name__.lower()


def shades(measure: Measure) -> list[list[float | None]]:
    """The shade of each cell between the lowest (0) and the highest value (1); None for a cell without a value."""
    low, high = extent(cell.value for row in measure.cells for cell in row if cell is not None)
    return [[_shade(cell, low, high) for cell in row] for row in measure.cells]


def _shade(cell: Cell | None, low: float, high: float) -> float | None:
    if cell is None or cell.value is None or not math.isfinite(cell.value):
        return None
    return round((cell.value - low) / (high - low), 2) if high > low else 0.0


def as_data(heat: Heat) -> dict[str, Any]:
    """A heat map for the script: the names of rows and columns, and every measure. A cell is null, a text, or a list of
    its text, its shade and 1 if something is wrong there."""
    measures = [{"name": one_line(measure.name), "cells": _data(measure)} for measure in heat.measures]
    rows, columns = ([one_line(name) for name in names] for names in (heat.row_names[:MOST_CELLS], heat.column_names))
    return {"rows": rows, "columns": columns, "measures": measures}


def _data(measure: Measure) -> list[list[Any]]:
    most = MOST_CELLS // max(1, len(measure.cells[0])) if measure.cells else 0
    rows = list(zip(measure.cells, shades(measure), strict=True))[:most]
    return [[_cell(cell, shade) for cell, shade in zip(cells, row, strict=True)] for cells, row in rows]


def _cell(cell: Cell | None, shade: float | None) -> Any:
    if cell is None:
        return None
    text = one_line(cell.text)
    return [text, shade, 1] if cell.bad else text if shade is None else [text, shade]


def top(curves: Curves) -> float:
    """The largest value: all pictures of a section have the same scale."""
    return max((value for _, item in curves.items for value in item if math.isfinite(value)), default=0.0) or 1.0


def points(values: Sequence[float], top: float) -> str:
    """The line of one small picture."""
    right = max(1, len(values) - 1)
    at = (
        (1 + number * (WIDTH - 2) / right, HEIGHT - 1 - max(0.0, value) / top * (HEIGHT - 2))
        for number, value in enumerate(values)
        if math.isfinite(value)
    )
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
