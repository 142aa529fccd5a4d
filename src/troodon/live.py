"""What is drawn on standard error again and again while something runs: bars, panels, small curves.

In a terminal it stands below what is said; in a notebook, below the cell.
"""

import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

from troodon import run
from troodon.text import duration, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

DRAWING_S = 0.1  # between two drawings
POINTS, SHORTEST, LONGEST = 32, 4, 16  # columns of a small curve, and of a bar
HEIGHTS = "▁▂▃▄▅▆▇█"
PAGE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3; margin: 0">{code}</pre>'
_lock = threading.RLock()
_active: dict[object, "Callable[[], RenderableType]"] = {}  # what is drawn, from the top
_drawn: dict[str, Any] = {"at": 0.0, "cell": None}  # when, and the part of a notebook where


def left(seconds: float) -> str:
    """The time left, in whole seconds, as a part of one says nothing."""
    return f"{duration(math.ceil(seconds))} left"


class Fitted:
    """What is drawn by a function of the columns that there are."""

    def __init__(self, drawing: "Callable[[int], RenderableType]"):
        self.drawing = drawing

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        yield self.drawing(options.max_width)


def bar(task: str, done: int, total: int, *words: str) -> Fitted:
    """A line with a bar. Where there is no room for all, the bar is shorter; then words are left out from the right."""
    return Fitted(lambda width: _line(width, task, done, max(1, total), words))


def _line(width: int, task: str, done: int, total: int, words: Sequence[str]) -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    texts = map(printable, (task, f"{done / total:4.0%}", *words))
    parts = [Text(text, no_wrap=True, overflow="ellipsis") for text in texts]
    parts[0].stylize("bold")
    while (room := width - sum(part.cell_len + 2 for part in parts)) < SHORTEST and len(parts) > 2:
        parts.pop()
    line = Table.grid(padding=(0, 2, 0, 0))
    shown = [ProgressBar(total, done, min(LONGEST, room))] if room >= SHORTEST else []
    line.add_row(parts[0], *shown, *parts[1:])
    return line


def panel(
    name: str,
    share: float,
    facts: Sequence[str],
    curves: Mapping[str, Sequence[float]],
    alarms: Mapping[str, str],
    verdict: str,
) -> "RenderableType":
    """A training: its progress, its numbers, its losses as small curves, and its health."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    def losses(width: int) -> Table:
        table, last = Table.grid(padding=(0, 2, 0, 0)), {term: f"{values[-1]:.3f}" for term, values in curves.items()}
        room = width - 4 - max(map(len, last), default=0) - max(map(len, last.values()), default=0)
        for term, values in curves.items():
            curve = sparkline(values, max(SHORTEST, min(POINTS, room)))
            table.add_row(Text(term), Text(curve, style="cyan"), Text(last[term]))
        return table

    health = [Text(printable(f"alarm, {alarm}: {text}"), style="bold red") for alarm, text in alarms.items()]
    health = health or ([Text(verdict, style="green")] if verdict else [])
    inside = Group(
        bar("", round(1000 * share), 1000, facts[0], facts[-1]), Text(" | ".join(facts[1:-1])), Fitted(losses), *health
    )
    title, colour = printable(name) or None, "red" if alarms else "blue"
    return Panel(inside, title=title, title_align="left", border_style=colour)


def sparkline(values: Sequence[float], points: int = POINTS) -> str:
    """Values as small columns of text, at most so many: the lowest is the lowest column."""
    step = max(1.0, len(values) / points)
    chosen = [values[int(i * step)] for i in range(min(points, len(values)))]
    low, high = min(chosen, default=0.0), max(chosen, default=0.0)
    heights = ((v - low) / (high - low) if high > low else 0.5 for v in chosen)
    return "".join(HEIGHTS[min(7, int(8 * h))] if h == h else " " for h in heights)


def is_live() -> bool:
    """Whether what is drawn can be drawn again: in a terminal that moves its cursor, and in a notebook."""
    if is_of_others():
        return False
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


def is_of_others() -> bool:
    """Whether this process does a part of the work of another, which shows how far that is."""
    if os.environ.get("RANK", "0") != "0":
        return True
    return parent_process() is not None and sys.stderr.isatty()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def draw(owner: object, drawing: "Callable[[], RenderableType]", now: bool = False) -> None:
    """Draw this for its owner, below what others draw; only a few times a second, unless `now`."""
    with _lock:
        is_new = owner not in _active
        _active[owner] = drawing
        if now or is_new or time.monotonic() - _drawn["at"] >= DRAWING_S:
            _show()


def clear(owner: object) -> None:
    """Take away what is drawn for this owner."""
    with _lock:
        if _active.pop(owner, None) is not None:
            _show()
            _drawn["cell"] = _drawn["cell"] if _active else None


def _show() -> None:
    from rich.console import Console, Group

    _drawn["at"] = time.monotonic()
    drawings = [drawing() for drawing in _active.values()]
    if not _in_notebook():
        console = Console(stderr=True)
        with console.capture() as captured:
            console.print(Group(*drawings)) if drawings else None
        return run.draw(captured.get())
    from IPython.display import HTML, display

    console = Console(file=io.StringIO(), record=True, width=110, force_jupyter=False)
    console.print(Group(*drawings))
    page = HTML(console.export_html(inline_styles=True, code_format=PAGE))
    if _drawn["cell"] is None:
        _drawn["cell"] = display(page, display_id=True)
    else:
        _drawn["cell"].update(page)
