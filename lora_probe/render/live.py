"""A recording that is shown again and again while it grows. Used by `show --follow`.

In: the command and its format, then a `Recording` for each change. Out: in a terminal a picture that is drawn again;
elsewhere a line for each adapter whose headline is new, or a document of another format when a headline is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from lora_probe.render.cells import words
from lora_probe.render.console import output, wrapped, write
from lora_probe.render.formats import present
from lora_probe.render.results import Recording

Draw = Callable[[Recording], None]


@contextmanager
def display(command: str, name: str, live: bool) -> Iterator[Draw]:
    """What draws a recording. `live`: the format is text, and may be a picture in a terminal."""
    console = output()
    if not (live and console.is_terminal and not console.is_dumb_terminal):
        yield _appended(command, name, live)
        return
    from lora_probe.render.text.trace import followed

    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as picture:

        def draw(recording: Recording) -> None:
            content = Group(*_flat(followed(recording), console.width))
            picture.update(content, refresh=True)

        yield draw


def _flat(renderable: RenderableType, width: int) -> Iterator[RenderableType]:
    """The parts of nested groups, with sentences broken at spaces."""
    if isinstance(renderable, Group):
        for part in renderable.renderables:
            yield from _flat(part, width)
    else:
        yield wrapped(renderable, width) if isinstance(renderable, Text) else renderable


def _appended(command: str, name: str, lines: bool) -> Draw:
    from lora_probe.render.text.trace import follow_lines

    before: set[str] = set()

    def draw(recording: Recording) -> None:
        nonlocal before
        now = list(follow_lines(recording))
        new = [line for line in now if line not in before]
        before = set(now)
        if new and lines:
            write(words(line).plain for line in new)
        elif new:
            present(command, name, recording)

    return draw
