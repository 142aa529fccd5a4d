"""The page of runs that go on: where they are, whether all is well, how they compare. It asks for news by itself."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from troodon.report.charts import describe_curve, overlay_chart
from troodon.report.markup import (
    MISSING,
    SPACE,
    Card,
    Content,
    Markup,
    duration,
    h,
    join,
    legend,
    number,
    percent,
    table,
)
from troodon.report.page import LOGO, cards_list, document
from troodon.report.runs import Run, health_text, knn_text
from troodon.report.training import (
    EXACT,
    FROM_ZERO,
    GROUPS,
    SHARES,
    Groups,
    charts,
    events_table,
    health_body,
    values,
)

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")  # of runs, in their order
DRAWN = 2_000  # records of a run, at most; of more, evenly spaced ones
BAD, WAITING, GOING, DONE = "bad", "waiting", "going", "done"  # of a run, the most urgent first
MARKS = {BAD: "#d33c3c", WAITING: "#e69f00", GOING: "#0072b2", DONE: "#009e73"}


@dataclass(frozen=True)
class Column:
    """What one backbone sees in the images that are watched: a picture for each of these, and the nearest others."""

    name: str  # of the run, or its step
    maps: list[str]  # addresses of pictures
    nearest: list[list[tuple[str, str, bool | None]]]  # for each image: picture, caption, whether the class is the same
    agree: float | None = None  # share of the nearest that are of the same class
    chance: float | None = None  # share of all others that are


@dataclass(frozen=True)
class Sight:
    """The images that are watched, and what backbones see in them; or why there is nothing to see yet."""

    images: list[tuple[str, str]]  # picture and caption
    columns: list[Column]
    note: str = ""


def state_of(run: Run, age: float | None) -> tuple[str, str]:
    """The state of a run, and what to call it. `age` is how many seconds ago it wrote something."""
    if run.alarms:
        return BAD, "not healthy"
    if run.not_finite and run.not_finite[-1] == run.records[-1]["step"]:
        return BAD, "the loss is not finite"
    if run.stopped_early:
        return WAITING, "stopped early"
    if run.finished:
        return DONE, "finished"
    if age is None or not run.records:
        return WAITING, "nothing recorded yet"
    if run.is_silent(age):
        return WAITING, f"no news for {duration(age)}"
    return GOING, "training"


def news(runs: Sequence[Run], ages: Sequence[float | None], sight: Sight, have: dict[str, str]) -> dict:
    """What the page shows in place of what it has: `have` are the versions of its parts."""
    states = [state_of(run, age) for run, age in zip(runs, ages, strict=True)]
    worst = min((state for state, _ in states), key=list(MARKS).index)
    parts = {"now": _now(runs, states), "curves": _curves(runs, GROUPS[:2]), "sight": _sight(sight)}
    parts["more"] = join(_curves(runs, GROUPS[2:]), _events(runs))
    versions = {name: hashlib.sha256(html.encode()).hexdigest()[:12] for name, html in parts.items()}
    changed = {n: {"version": versions[n], "html": html} for n, html in parts.items() if have.get(n) != versions[n]}
    return {"title": _title(runs, states), "state": worst, "icon": _icon(worst), "parts": changed}


def live_page(runs: Sequence[Run], ages: Sequence[float | None], sight: Sight) -> tuple[str, str]:
    """The whole page as it is now, and the policy that it is served with: it runs one script, and loads from here."""
    first, script = news(runs, ages, sight, {}), Path(__file__).with_name("live.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; script-src 'sha256-{digest}'"
    )
    parts = {name: Markup(part["html"]) for name, part in first["parts"].items()}
    body = (
        h("p", "The watcher has ended: this page shows what was last known.", class_="lost", role="status"),
        h("header", h("p", LOGO, "Troodon watch", class_="kicker"), h("h1", ", ".join(run.name for run in runs))),
        h("div", parts["now"], id="now", role="status"),
        h("main", (h("div", parts[name], id=name) for name in ("curves", "sight", "more")), id="content"),
        h("footer", h("p", "Served by troodon watch on this machine alone. The training knows nothing of it.")),
        h("script", Markup(script)),
    )
    return document(first["title"], *body, policy=None, icon=first["icon"], state=first["state"]), policy


def _title(runs: Sequence[Run], states: Sequence[tuple[str, str]]) -> str:
    """What a tab shows: the worst first, as only its beginning is seen."""
    state, words = min(states, key=lambda known: list(MARKS).index(known[0]))
    names = ", ".join(run.name for run in runs)
    if state == BAD:
        alarms = [name for run in runs for name in run.alarms]
        return f"⚠ {', '.join(dict.fromkeys(alarms)) or words}: {names}"
    if state == GOING and len(runs) == 1:
        return f"{runs[0].share:.0%} {names}"
    return f"{words}: {names}"


def _icon(state: str) -> str:
    circle = f"<circle cx='8' cy='8' r='7' fill='{MARKS[state]}'/>"
    return "data:image/svg+xml," + quote(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>{circle}</svg>")


def _now(runs: Sequence[Run], states: Sequence[tuple[str, str]]) -> Markup:
    """The top of the page: the state of each run, its progress, and what is wrong."""
    out: list[Content] = []
    for run, (state, words) in zip(runs, states, strict=True):
        name = h("strong", f"{run.name}: ") if len(runs) > 1 else None
        goal = f" of {number(run.planned)} steps" if run.planned else " steps"
        left = f", {duration(run.seconds_left)} left" if run.seconds_left is not None and state != WAITING else ""
        words = words if len(runs) > 1 else words[:1].upper() + words[1:]
        line = f"{words}{SPACE}· {number(run.done)}{goal}{left}" if run.records else words
        bar = h("div", h("i", style=f"width: {100 * run.share:.1f}%"), class_="bar", aria_hidden="true")
        out.append(h("div", h("p", name, line), bar, class_=f"run {state}"))
        out.append(health_body(run) if run.alarms else None)
    if len(runs) == 1:
        out.append(cards_list(_cards(runs[0])))
    else:
        head = ("run", "state", "steps", "images/s", "loss", "k-NN")
        named = zip(runs, states, strict=True)
        rows = [(run.name, words, number(run.done), *_numbers(run)) for run, (_, words) in named]
        out.append(table("All runs", head, rows, text=2))
    return join(out)


def _numbers(run: Run) -> tuple[str, str, str]:
    """Speed, loss and k-NN of now."""
    speed, loss, knn = (run.last(key) for key in ("images_per_second", "loss", "knn"))
    return (
        number(float(speed)) if speed is not None else MISSING,
        number(float(loss), 4) if loss is not None else MISSING,
        percent(knn),
    )


def _cards(run: Run) -> list[Card]:
    if not run.records:
        return []
    speed, loss, knn = _numbers(run)
    waits = run.last("data_wait")
    cards = [Card("images/s", speed, f"{percent(waits, 0)} of the time waits for images" if waits is not None else "")]
    cards.append(Card("loss", loss, "the sum of the terms"))
    if run.knn:
        before = knn_text(run).partition(", ")[2]
        cards.append(Card("quick k-NN", knn, before, strong=True))
    cards.append(Card("time of training", duration(run.seconds) if run.seconds is not None else MISSING))
    verdict = "alarm" if run.alarms else "no alarm" if run.health_readings else MISSING
    cards.append(Card("health", verdict, health_text(run)))
    return cards


def _thinned(run: Run) -> list[dict]:
    """Records, not too many to draw every few seconds; those with a k-NN or the last are all there."""
    step = -(-len(run.records) // DRAWN)
    return [r for i, r in enumerate(run.records) if i % step == 0 or "knn" in r or i == len(run.records) - 1]


def _curves(runs: Sequence[Run], groups: Groups) -> Markup:
    """Curves of one run, or of several runs over one another."""
    if len(runs) == 1:
        return join(charts(_thinned(runs[0]), "h2", groups))
    records = [_thinned(run) for run in runs]
    out: list[Content] = [legend(*((COLOURS[i % len(COLOURS)], run.name) for i, run in enumerate(runs)))]
    for title, group in groups:
        drawn = [_overlay(runs, records, key, name, caption) for key, name, caption in group]
        if any(drawn):
            out += [h("h2", title, class_="sub"), h("div", drawn, class_="grid")]
    return join(out)


def _events(runs: Sequence[Run]) -> Content:
    """What happened in each run beside its steps."""
    named = [(h("h2", run.name, class_="sub") if len(runs) > 1 else None, events_table(run.events)) for run in runs]
    return [part for part in named if part[1]]


def _overlay(runs: Sequence[Run], records: Sequence[list[dict]], key: str, title: str, caption: str | None) -> Content:
    lines: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for i, (run, rows) in enumerate(zip(runs, records, strict=True)):
        x_N, y_N = values(rows, key)
        if len(x_N):
            lines.append((run.name, COLOURS[i % len(COLOURS)], x_N, y_N))
    if not lines:
        return None
    unit = f"{SPACE}%" if key in SHARES else ""
    label = "; ".join(describe_curve(f"{title}, {name}", x_N, y_N, unit) for name, _, x_N, y_N in lines)
    drawing = overlay_chart(
        lines, label=label, unit=unit, floor=0.0 if key in FROM_ZERO else None, smooth=key not in EXACT
    )
    return h("figure", h("p", title, class_="title"), drawing, h("figcaption", caption) if caption else None)


def _sight(sight: Sight) -> Markup:
    """The same images as backbones see them: principal components, and the nearest other images."""
    note = h("p", sight.note, class_="note") if sight.note else None
    if not sight.columns:
        return join(h("h2", "What it sees", class_="sub"), note) if note else Markup("")
    head = h("tr", h("th", "image", scope="col"), (h("th", c.name, scope="col") for c in sight.columns))
    rows = []
    for i, (source, caption) in enumerate(sight.images):
        seen = (h("td", h("img", src=c.maps[i], alt=f"components of {caption}, {c.name}")) for c in sight.columns)
        rows.append(h("tr", h("th", h("img", src=source, alt=caption, title=caption), scope="row"), seen))
    whole = h("table", h("caption", "Principal components of the patches"), h("thead", head), h("tbody", rows))
    last, near = sight.columns[-1], []
    for i, (source, caption) in enumerate(sight.images):
        query = _tile(source, caption, "query")
        near.append(h("div", query, (_tile(*one[:2], _kind(one[2])) for one in last.nearest[i]), class_="strip"))
    agree = [f"{c.name}: {percent(c.agree, 0)}" for c in sight.columns if c.agree is not None]
    by_chance = f"; by chance {percent(last.chance, 0)}" if last.chance is not None else ""
    labelled = f" Of the same class as the image are {', '.join(agree)}{by_chance}." if agree else ""
    words = "The first three principal components as red, green and blue: parts that mean the same get the same colour."
    return join(
        h("h2", "What it sees", class_="sub"),
        note,
        h("div", whole, class_="scroll sight", role="region", tabindex="0", aria_label="Principal components"),
        h("p", words, class_="note"),
        h("h3", f"The nearest images, {last.name}", class_="sub"),
        h("div", near, class_="groups"),
        h("p", f"By the cosine of class tokens, the nearest first.{labelled}", class_="note"),
    )


def _kind(same: bool | None) -> str:
    return "" if same is None else "same" if same else "other"


def _tile(source: str, caption: str, kind: str) -> Markup:
    image = h("span", h("img", src=source, alt=caption, title=caption), class_="box")
    return h("figure", image, h("figcaption", caption), class_=f"thumb {kind}".strip())
