"""Progress of what takes long, on standard error: how far, how fast, and how long still.

In a terminal, bars stand below what is said and are drawn again and again; in a notebook, below the cell. Elsewhere, as
in a file or a pipe, a line comes every few seconds.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any, Self, TypeVar

from troodon import run
from troodon.text import duration, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")
LINE_S, DRAWING_S = 5.0, 0.1  # between two lines, and between two drawings
POINTS = 32  # of a small curve
HEIGHTS = "▁▂▃▄▅▆▇█"
PAGE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3; margin: 0">{code}</pre>'
_lock = threading.RLock()
_active: dict[object, "Callable[[], RenderableType]"] = {}  # what is drawn, from the top
_drawn: dict[str, Any] = {"at": 0.0, "cell": None}  # when, and the part of a notebook where


class Progress:
    """How far a task is: call it with (done, total), or `add` to what is done. It is gone once all is done, or closed.

    `items` is the plural of what is counted.
    """

    def __init__(self, task: str, items: str = "images", total: int = 0, interval: float = LINE_S):
        self.task, self.items, self.total, self.interval = task, items, total, interval
        self.start = self.last_print = time.monotonic()
        self.first: int | None = None  # what was done before
        self.done = 0

    def add(self, count: int) -> None:
        self.first = self.first or 0
        self(self.done + count, self.total)

    def __call__(self, done: int, total: int) -> None:
        """So many of all are done. What the first call tells was done earlier, and says nothing of the speed."""
        if self.first is None:
            self.first, self.start = done, time.monotonic()
        self.done, self.total = done, total
        if done >= total:
            self.close()
        elif is_live():
            draw(self, self._bar)
        elif time.monotonic() - self.last_print >= self.interval and not _of_others():
            self.last_print = time.monotonic()
            run.say(", ".join([f"{self.task}: {self.done:,} of {self.total:,} {self.items}", *self._pace()]))

    def _pace(self) -> list[str]:
        """The speed and the time left, once they are known."""
        done, seconds = self.done - (self.first or 0), time.monotonic() - self.start
        if done <= 0 or seconds <= 0:
            return []
        rate = done / seconds
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return [f"{speed} a second", f"{duration((self.total - self.done) / rate)} left"]

    def _bar(self) -> "RenderableType":
        return bar(self.task, self.done, self.total, f"{self.done:,} of {self.total:,} {self.items}", *self._pace())

    def close(self) -> None:
        clear(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watched(values: Sequence[T], task: str, items: str) -> Iterator[T]:
    """The values one after the other, while it is shown how many are done."""
    with Progress(task, items, len(values)) as progress:
        for value in values:
            yield value
            progress.add(1)


def bar(task: str, done: int, total: int, *words: str) -> "RenderableType":
    """A line with a bar, as rich draws it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 2, 0, 0))
    shown = ProgressBar(total=max(1, total), completed=done, width=16)
    share = Text(f"{done / max(1, total):4.0%}")
    line.add_row(Text(task, style="bold"), shown, share, *(Text(printable(word), no_wrap=True) for word in words))
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

    losses = Table.grid(padding=(0, 2, 0, 0))
    for term, values in curves.items():
        losses.add_row(Text(term), Text(sparkline(values), style="cyan"), Text(f"{values[-1]:.3f}"))
    health = [Text(printable(f"alarm, {alarm}: {text}"), style="bold red") for alarm, text in alarms.items()]
    health = health or ([Text(verdict, style="green")] if verdict else [])
    inside = Group(
        bar("", round(1000 * share), 1000, facts[0], facts[-1]), Text(" | ".join(facts[1:-1])), losses, *health
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
    if _of_others():
        return False
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


def _of_others() -> bool:
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
