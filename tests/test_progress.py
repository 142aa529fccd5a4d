"""Progress: bars where they can be drawn again, lines where they cannot, and nothing among the results."""

import io
import re
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rich.console import Console, RenderableType

from troodon import live, progress, run
from troodon.evaluate import dense, linear, logistic
from troodon.evaluate.config import DenseConfig, LinearConfig
from troodon.explore import layout
from troodon.live import bar, panel, sparkline
from troodon.progress import Progress, watched


@pytest.fixture(autouse=True)
def _nothing_drawn() -> Iterator[None]:
    yield
    live._active.clear()
    live._drawn["cell"] = None
    run._drawing[0] = ""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Standard error is a terminal, 80 columns wide."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(live, "DRAWING_S", 0.0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test changes it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def screen(written: str) -> list[str]:
    """What a terminal shows after this was written."""
    lines, at = [""], 0
    for part in re.split(r"(\x1b\[\d*[AJm]|\x1b\[[\d;]*m|\r|\n)", written):
        if move := re.fullmatch(r"\x1b\[(\d+)A", part):
            at -= int(move[1])
        elif part == "\x1b[J":
            lines = [*lines[:at], ""]
        elif part == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif part != "\r" and not part.startswith("\x1b"):
            lines[at] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_a_bar_stands_below_what_is_said_and_is_gone_at_the_end(
    terminal: None, capsys: pytest.CaptureFixture, now: list[float]
) -> None:
    with Progress("scan", "images", 1000) as show:
        show.add(250)
        run.say("a.jpg: cannot be read")
        now[0] += 0.004
        show.add(250)
        drawn = capsys.readouterr().err
        said, line = screen(drawn)
        assert said == "a.jpg: cannot be read"
        assert re.fullmatch(r"scan  ━+╺?━+   50%  500 of 1,000 images  125,000 a second  1 s left", line)
    run.say("done")
    assert screen(drawn + capsys.readouterr().err) == ["a.jpg: cannot be read", "done"]
    assert capsys.readouterr().out == ""


def drawn_at(width: int, drawing: RenderableType) -> list[str]:
    console = Console(width=width, file=(out := io.StringIO()), force_terminal=True, color_system="standard")
    console.print(drawing)
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (100, "embed  ━━━━━━━━━━━━━━━━   50%  500,000 of 1,000,000 images  140,000 a second  1 h 5 min left"),
        (80, "embed  ━━━━   50%  500,000 of 1,000,000 images  140,000 a second  1 h 5 min left"),
        (79, "embed  ━━━━━━━━━━━━━━━━   50%  500,000 of 1,000,000 images  140,000 a second"),
        (60, "embed  ━━━━━━━━━━━━━━━━   50%  500,000 of 1,000,000 images"),
        (40, "embed  ━━━━━━━━━━━━━━━━   50%"),
        (15, "embed   50%"),
        (8, "e…   50%"),
    ],
)
def test_a_bar_in_little_room_is_shorter_and_then_says_less(width: int, line: str) -> None:
    """No word is cut in its middle."""
    words = "500,000 of 1,000,000 images", "140,000 a second", "1 h 5 min left"
    (shown,) = drawn_at(width, bar("embed", 500_000, 1_000_000, *words))
    assert re.sub("[╺╸]", "━", shown) == line


@pytest.mark.parametrize(
    ("done", "seconds", "words"),
    [
        (500, 0.003576, ["140,000 a second", "1 s left"]),
        (1, 0.7, ["1.4 a second", "11 min 40 s left"]),
        (999, 3.2, ["312 a second", "1 s left"]),
        (500, 7300.0, ["0.068 a second", "2 h 1 min left"]),
    ],
)
def test_speed_and_time_are_said_as_exactly_as_they_are_known(
    done: int, seconds: float, words: list[str], now: list[float]
) -> None:
    show = Progress("scan", total=1000)
    show.add(0)
    show.done = done
    now[0] += seconds
    assert show._pace() == words


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_panel_fits_its_terminal(width: int) -> None:
    facts = ["step 123,456/1,250,000", "12,345 images/s", "data wait 12%", "k-NN 31.0%", "12 d 23 h left"]
    curves = {term: [float(i) for i in range(90)] for term in ("loss", "contrast")}
    lines = drawn_at(width, panel("runs/first", 0.1, facts, curves, {}, "no alarm"))
    assert {len(line) for line in lines} == {width}
    assert "step 123,456/1,250,000" in lines[1]
    assert ("12 d 23 h left" in lines[1]) is (width > 40)
    assert "12,345 images/s" in lines[2]
    for term in curves:
        (line,) = [line for line in lines if term in line]
        assert re.search(rf"{term} +▁.*█  89\.000 ", line), line


def test_a_bar_within_another_stands_below_it(terminal: None, capsys: pytest.CaptureFixture) -> None:
    drawn = ""
    for unit in watched(range(3), "duplicate", "units"):
        if unit == 1:
            Progress("looks", "pairs", 4).add(4)  # all are done: it closes itself
            with Progress("embed", "images", 4) as inner:
                inner.add(1)
                outer, inside = screen(drawn := capsys.readouterr().err)
                assert outer.startswith("duplicate")
                assert inside.startswith("embed")
    assert screen(drawn + capsys.readouterr().err) == []


def test_an_error_takes_the_bar_away(terminal: None, capsys: pytest.CaptureFixture) -> None:
    from troodon.launch import run_command

    def work() -> None:
        Progress("pack", "images", 10).add(1)
        raise OSError("no more")

    assert run_command(work, "troodon pack") == 1
    shown = screen(capsys.readouterr().err)
    assert len(shown) == 1
    assert "no more" in shown[0]


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture, now: list[float]) -> None:
    with Progress("scan", total=1000) as show:
        for done in range(500, 1000, 100):  # 500 were done by an earlier command
            show(done, 1000)
            now[0] += 2.0
    assert capsys.readouterr().err.splitlines() == ["scan: 800 of 1,000 images, 50 a second, 4 s left"]


def test_parts_of_the_work_of_another_process_draw_nothing(
    terminal: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "parent_process", lambda: object())
    Progress("embed", "images", 10, interval=0.0).add(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: False)
    Progress("embed", "images", 10, interval=0.0).add(1)
    assert "embed: 1 of 10 images" in capsys.readouterr().err


def test_ranks_beside_the_first_draw_nothing(
    terminal: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    Progress("linear head", "steps", 10, interval=0.0).add(1)
    assert capsys.readouterr().err == ""


class _Maps:
    channels = 3

    def get(self, windows: np.ndarray, blocks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(windows), len(blocks), 3, 2, 2), torch.ones(len(windows), len(blocks), 3)


@pytest.mark.parametrize("kind", ["linear", "logistic", "linear_4 head", "map"])
def test_heads_and_the_map_show_their_steps(
    kind: str, terminal: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=random), torch.arange(12) % 2
    if kind == "linear":
        config = LinearConfig(rates=(0.1,), epochs=1, least_steps=4, most_steps=4)
        linear.fit(x, y, [linear.Slice(1, "cls", 0, 3)], 2, config, 0)
    elif kind == "logistic":
        logistic.solve(x, y, 2, (1.0,), 4, 1e-12)
    elif kind == "map":
        monkeypatch.setattr(layout, "STEPS", 4)
        layout.arrange(x.numpy()[:, :2], *layout.nearest_neighbours(x.numpy(), 2))
    else:
        task, target = dense.SegmentationTask(2), np.zeros((2, 8, 8), int)
        dense.train_head("linear_4", task, _Maps(), (0,), target, np.arange(2), DenseConfig(steps=4), 0)
    written = capsys.readouterr().err
    lines = re.sub(r"\x1b\[[\d;]*[AJm]", "", written).splitlines()
    assert any(line.startswith(f"{kind} ") and "2 of 4 steps" in line for line in lines), lines
    assert screen(written) == []


def test_a_training_shows_its_losses_as_curves_and_its_alarms(terminal: None, capsys: pytest.CaptureFixture) -> None:
    owner, curves = object(), {"loss": [8.0, 6.0, 4.0], "ibot": [1.0, 2.0, 3.0]}
    facts = ["step 30/100", "12 images/s", "k-NN 31.0%", "2 min left"]
    live.draw(owner, lambda: panel("first", 0.3, facts, curves, {}, "no alarm"), now=True)
    text = "\n".join(screen(drawn := capsys.readouterr().err))
    assert "█▅▁" in text
    assert "▁▅█" in text
    for words in ("first", "30%", "step 30/100", "2 min left", "12 images/s | k-NN 31.0%", "4.000", "no alarm"):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 80
    live.clear(owner)
    live.draw(owner, lambda: panel("", 0.3, facts, curves, {"flat": "targets are \x1b[31muniform"}, ""), now=True)
    assert "alarm, flat: targets are" in "\n".join(screen(drawn + capsys.readouterr().err))


def test_curves_of_any_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0]) == "▅"
    assert sparkline([0.0, float("nan"), 1.0], 3)[0] != " "
    assert len(sparkline([float(i) for i in range(1000)])) == live.POINTS


def test_a_notebook_gets_a_part_that_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, page: str) -> None:
            shown[-1] = page

    def display(page: str, display_id: bool) -> Handle:
        shown.append(page)
        return Handle()

    inner = types.SimpleNamespace(HTML=lambda text: text, display=display)
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()), display=inner)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    monkeypatch.setattr(live, "DRAWING_S", 0.0)
    with Progress("scan", total=100) as bar:
        bar(10, 100)
        bar(60, 100)
        assert len(shown) == 1
        assert "60 of 100 images" in re.sub(r"<[^>]+>", "", shown[0])
    with Progress("pack", total=100) as bar:
        bar(10, 100)
    assert len(shown) == 2, "the next cell has its own"
    assert capsys.readouterr().err == ""
