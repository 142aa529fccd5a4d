"""The sections about images: the embedded world, and indexes with their formats, sizes and broken files."""

from collections import Counter, defaultdict

import numpy as np

from troodon.images.index import Index
from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.markup import (
    SPACE,
    Card,
    Content,
    Markup,
    Section,
    details,
    figure,
    file_size,
    h,
    is_number,
    join,
    note,
    number,
    percent,
    table,
)
from troodon.report.thumbnails import Frame, picture, spread, thumbnail
from troodon.text import plural

BROKEN, GROUPS, CONTACT_SHEET = 20, 8, 48  # files, groups, images of the contact sheet
CLASSES, CLASS_IMAGES, MEMBERS, EXTREMES = 12, 5, 5, 5  # classes, images of each, of a group, of a kind of extreme


def world_section(artifacts: list[Artifact]) -> Section | None:
    """The settings and pictures of made worlds. None without one."""
    if not artifacts:
        return None
    body: list[Content] = []
    for artifact in artifacts:
        numbers = [(key.replace("_", " "), number(v)) for key, v in artifact.settings.items() if _is_scalar(v)]
        for path in artifact.pictures():
            title = path.stem.replace("_", " ")
            shown = picture(path, title)
            body.append(figure(shown, title.capitalize()) if shown else None)
        title = f"Settings of {artifact.name}"
        body.append(details(title, table(title, ("setting", "value"), numbers)) if numbers else None)
    return Section("world", "The world", join(h("p", "The images were made, not collected."), body))


def images_section(artifacts: list[Artifact]) -> Section | None:
    """Counts, formats, sizes, broken files and duplicates. None without an index."""
    tables = [
        (artifact, Index.load(artifact.folder / "images.parquet")) for artifact in artifacts if _has_images(artifact)
    ]
    if not tables:
        return None
    body, total, broken = [], 0, 0
    for artifact, index in tables:
        bad = _broken_rows(index)
        total, broken = total + len(index), broken + len(bad)
        body.append(h("h3", artifact.name) if len(tables) > 1 else None)
        body.append(_index_body(index, bad))
    card = Card(
        "images found", number(total), plural(broken, "cannot be read", "cannot be read") if broken else "all readable"
    )
    return Section(
        "images", "Images", join(body), (card,), f"{plural(total, 'image')} {'was' if total == 1 else 'were'} found"
    )


def _index_body(index: Index, bad: list[int]) -> Markup:
    body: list[Content] = [h("p", _summary(index, bad), class_="prose")]
    broken = set(bad)
    good = [row for row in range(len(index)) if row not in broken]
    if good:
        strip = h("div", (thumbnail(index, row) for row in spread(good, CONTACT_SHEET)), class_="strip")
        body.append(figure(strip, "Contact sheet", "Evenly spaced over the index."))
    body.append(h("div", _formats(index), _shorter_sides(index), class_="grid two"))
    body += [_extremes(index, good), _classes(index, good)]
    if bad:
        rows = [(index.path(row), _value(index, "status", row), _value(index, "reason", row)) for row in bad[:BROKEN]]
        rest = f"; the first {BROKEN} of {number(len(bad))}" if len(bad) > BROKEN else ""
        body.append(table(f"Files that cannot be read{rest}", ("file", "status", "reason"), rows, text=3))
        if len(bad) > BROKEN:
            body.append(note(f"and {number(len(bad) - BROKEN)} more."))
    body.append(_duplicates(index) if good else None)
    return join(body)


def _extremes(index: Index, good: list[int]) -> Content:
    """The smallest, the largest and the most elongated images, which are often no photographs."""
    if not (good and _has_column(index, "width") and _has_column(index, "height")):
        return None
    sides = np.array([(index.table["width"][r].as_py(), index.table["height"][r].as_py()) for r in good], float)
    if np.isnan(sides).any() or (sides == sides[0]).all():
        return None
    area, long = sides.prod(1), sides.max(1) / sides.min(1)
    kinds = {"smallest": np.argsort(area, kind="stable"), "largest": np.argsort(-area, kind="stable")}
    if long.max() > 2:
        kinds["most elongated"] = np.argsort(-long, kind="stable")
    strips = []
    for name, order in kinds.items():
        cells = (
            thumbnail(index, good[i], Frame(f"{number(int(sides[i, 0]))} x {number(int(sides[i, 1]))}"))
            for i in order[:EXTREMES]
        )
        strips.append(h("div", h("p", name.capitalize(), class_="note"), h("div", cells, class_="strip")))
    return figure(h("div", strips, class_="groups"), "Extremes", "Width by height in pixels.")


def _classes(index: Index, good: list[int]) -> Content:
    """Example images of some classes, from the largest class to the smallest."""
    rows_of = defaultdict(list)
    labels = index.column("label")
    for row in good:
        if labels[row] is not None:
            rows_of[labels[row]].append(row)
    if len(rows_of) < 2:
        return None
    by_size = sorted(rows_of, key=lambda name: (-len(rows_of[name]), name))
    strips = []
    for name in spread(by_size, CLASSES):
        title = h("p", f"{name}, {plural(len(rows_of[name]), 'image')}", class_="note")
        cells = (thumbnail(index, row) for row in spread(rows_of[name], CLASS_IMAGES))
        strips.append(h("div", title, h("div", cells, class_="strip")))
    shown = f", {CLASSES} of them shown, from the largest to the smallest" if len(rows_of) > CLASSES else ""
    return figure(h("div", strips, class_="groups"), "Classes", f"{plural(len(rows_of), 'class', 'classes')}{shown}.")


def _summary(index: Index, bad: list[int]) -> str:
    words = [plural(len(index), "file")]
    if _has_column(index, "length"):
        words.append(file_size(sum(n for n in index.column("length") if is_number(n) and n > 0)))
    labels = {label for label in index.column("label") if label is not None} if _has_column(index, "label") else set()
    if labels:
        words.append(plural(len(labels), "class", "classes"))
    kinds = Counter(_value(index, "status", row) or "unknown" for row in bad)
    reasons = ", ".join(f"{number(n)} {kind}" for kind, n in kinds.most_common())
    state = f"{plural(len(bad), 'file')} cannot be read ({reasons})." if bad else "Every one can be read."
    if len(bad) == len(index):
        state = f"None can be read ({reasons}), so nothing here can be used."
    return f"{', '.join(words)}. {state}"


def _formats(index: Index) -> Content:
    if not _has_column(index, "format"):
        return None
    counts = Counter(value for value in index.column("format") if value).most_common()
    if not counts:
        return None
    top = sum(count for _, count in counts)
    rows = [charts.Bar(name, f"{number(n)} ({percent(n / top)})", (("c1", n / top),)) for name, n in counts[:8]]
    more = f"{number(len(counts) - 8)} rarer formats are not shown." if len(counts) > 8 else None
    return figure(charts.bar_chart(rows, label="Formats", top=1.0, unit=f"{SPACE}%", scale=100), "Formats", more)


def _shorter_sides(index: Index) -> Content:
    """Histogram of the shorter side, which limits how sharp a crop can be."""
    if not (_has_column(index, "width") and _has_column(index, "height")):
        return None
    sizes = [s for s in zip(index.column("width"), index.column("height")) if is_number(s[0]) and is_number(s[1])]
    if not sizes:
        return None
    short = np.array([min(size) for size in sizes])
    (width, height), most = Counter(sizes).most_common(1)[0]
    low, half, high = (number(int(v)) for v in (short.min(), np.median(short), short.max()))
    caption = f"From {low} to {high} pixels, half of them {half} or more."
    if most > 0.2 * len(sizes):
        caption += f" {percent(most / len(sizes))} are {number(width)} by {number(height)}."
    edges = _edges(float(short.min()), float(short.max()))
    counts = np.histogram(short, edges)[0].tolist()
    drawing = charts.histogram(counts, edges, label=f"Histogram of the shorter side. {caption}", unit=" pixels")
    return figure(drawing, "Shorter side, in pixels", caption)


def _edges(low: float, high: float) -> list[float]:
    """Bin edges: round numbers from `low` to beyond `high`; powers of two where sizes differ much."""
    if high > 16 * max(low, 1.0):
        first, last = int(np.floor(np.log2(max(low, 1.0)))), int(np.floor(np.log2(high))) + 1
        return [2.0**i for i in range(first, last + 1)]
    at = charts.ticks(low, max(high, low + 8), 10, whole=True)
    step = at[1] - at[0]
    edges = [at[0] - step, *at] if at[0] > low else list(at)
    while edges[-1] <= high:
        edges.append(edges[-1] + step)
    return edges


def _duplicates(index: Index) -> Content:
    """Images that occur more than once: byte for byte, or with the same pixels in other bytes."""
    if not _has_column(index, "sha256"):
        return None
    same_bytes = _groups(index, "sha256")
    same_picture = _groups(index, "pixels") if _has_column(index, "pixels") else same_bytes
    if not same_picture:
        return h("p", "No two files hold the same picture.", class_="prose")
    digests, sentences = index.column("sha256"), []
    copies = sum(len(rows) - 1 for rows in same_bytes)
    resaved = sum(len({digests[row] for row in rows}) - 1 for rows in same_picture)
    if copies:
        who = f"{plural(copies, 'file')} {'is' if copies == 1 else 'are'}"
        sentences.append(f"{who} byte for byte a copy of another, in {plural(len(same_bytes), 'group')}.")
    if resaved:
        sentences.append(
            f"{number(resaved)} more {'has' if resaved == 1 else 'have'} the pixels of another in other bytes."
        )
    labels, splits = index.column("label"), index.column("split")

    def kinds(rows: list[int]) -> tuple[int, int]:
        return len({labels[r] for r in rows} - {None}), len({splits[r] for r in rows} - {None})

    conflicting = [rows for rows in same_picture if kinds(rows)[0] > 1]
    leaking = [rows for rows in same_picture if kinds(rows)[1] > 1]
    if conflicting:
        sentences.append(f"In {plural(len(conflicting), 'group')} images have different labels.")
    if leaking:
        sentences.append(
            f"{plural(len(leaking), 'group')} {'lies' if len(leaking) == 1 else 'lie'} in more than one split."
        )
    same_picture.sort(key=lambda rows: (*(-n for n in kinds(rows)), -len(rows), rows[0]))  # conflicts and leaks first
    strips = []
    for rows in same_picture[:GROUPS]:
        cells = [thumbnail(index, r, Frame(" / ".join(filter(None, (splits[r], labels[r]))))) for r in rows[:MEMBERS]]
        more = h("span", f"+ {number(len(rows) - MEMBERS)}", class_="more") if len(rows) > MEMBERS else None
        strips.append(h("div", cells, more, class_="strip"))
    first = "Conflicting labels and splits" if conflicting or leaking else "The largest groups"
    names = table("Files", ("files", "count"), [(_names(index, g), number(len(g))) for g in same_picture[:GROUPS]])
    return join(
        h("p", " ".join(sentences), class_="prose"),
        figure(h("div", strips, class_="groups"), "The same picture more than once", f"{first} come first."),
        details("Their names", names),
    )


def _groups(index: Index, column: str) -> list[list[int]]:
    rows_of = defaultdict(list)
    for row, digest in enumerate(index.column(column)):
        if digest:
            rows_of[digest].append(row)
    return [rows for rows in rows_of.values() if len(rows) > 1]


def _names(index: Index, rows: list[int]) -> str:
    return ", ".join(index.path(row) for row in rows[:4]) + (" …" if len(rows) > 4 else "")


def _broken_rows(index: Index) -> list[int]:
    if not _has_column(index, "status"):
        return []
    return [row for row, status in enumerate(index.column("status")) if status not in (None, "ok")]


def _value(index: Index, name: str, row: int) -> Content:
    return index.table[name][row].as_py() if _has_column(index, name) else None


def _has_column(index: Index, name: str) -> bool:
    return name in index.table.column_names


def _has_images(artifact: Artifact) -> bool:
    return (artifact.folder / "images.parquet").is_file()


def _is_scalar(value: object) -> bool:
    return isinstance(value, str) or is_number(value) or isinstance(value, bool)
