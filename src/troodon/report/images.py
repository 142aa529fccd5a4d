"""What was found: the embedded world, and the index of images with its formats, sizes and broken files."""

from collections import Counter, defaultdict

import numpy as np

from troodon.data.index import Index
from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.markup import (
    SPACE,
    Card,
    Content,
    Markup,
    Part,
    figure,
    file_size,
    folded,
    h,
    is_number,
    join,
    note,
    number,
    plural,
    share,
    table,
)
from troodon.report.thumbnails import picture, spread, thumbnail

BROKEN, GROUPS, SHOWN = 20, 10, 22


def world(artifacts: list[Artifact]) -> Part | None:
    """Made images: what they were made of. None without them."""
    if not artifacts:
        return None
    body: list[Content] = []
    for one in artifacts:
        numbers = [(key.replace("_", " "), number(v)) for key, v in one.settings.items() if _simple(v)]
        for path in one.pictures():
            title = path.stem.replace("_", " ")
            shown = picture(path, title)
            body.append(figure(shown, title.capitalize()) if shown else None)
        body.append(table(f"Settings of {one.name}", ("setting", "value"), numbers) if numbers else None)
    return Part("world", "The world", join(h("p", "The images were made, not collected."), body))


def images(artifacts: list[Artifact]) -> Part | None:
    """Counts, formats, sizes, broken files and identical ones. None without an index."""
    tables = [(one, Index.load(one.folder / "images.parquet")) for one in artifacts if _has(one)]
    if not tables:
        return None
    body, total, broken = [], 0, 0
    for one, index in tables:
        bad = _broken(index)
        total, broken = total + len(index), broken + len(bad)
        body.append(h("h3", one.name) if len(tables) > 1 else None)
        body.append(_one(index, bad))
    card = Card(
        "images found", number(total), plural(broken, "cannot be read", "cannot be read") if broken else "all readable"
    )
    return Part(
        "images", "Images", join(body), (card,), f"{plural(total, 'image')} {'was' if total == 1 else 'were'} found"
    )


def _one(index: Index, bad: list[int]) -> Markup:
    said: list[Content] = [h("p", _summary(index, bad), class_="prose")]
    broken = set(bad)
    good = [row for row in range(len(index)) if row not in broken]
    if good:
        strip = h("div", (thumbnail(index, row) for row in spread(good, SHOWN)), class_="strip")
        said.append(figure(strip, "A look at the images", "Evenly spaced over the index."))
    said.append(h("div", _formats(index), _sides(index), class_="grid two"))
    if bad:
        rows = [(index.path(row), _cell(index, "status", row), _cell(index, "reason", row)) for row in bad[:BROKEN]]
        rest = f"; the first {BROKEN} of {number(len(bad))}" if len(bad) > BROKEN else ""
        said.append(table(f"Files that cannot be read{rest}", ("file", "status", "reason"), rows, text=3))
        if len(bad) > BROKEN:
            said.append(note(f"and {number(len(bad) - BROKEN)} more."))
    said.append(_identical(index))
    return join(said)


def _summary(index: Index, bad: list[int]) -> str:
    words = [plural(len(index), "file")]
    if _known(index, "length"):
        words.append(file_size(sum(n for n in index.column("length") if is_number(n) and n > 0)))
    labels = {label for label in index.column("label") if label is not None} if _known(index, "label") else set()
    if labels:
        words.append(plural(len(labels), "class", "classes"))
    kinds = Counter(_cell(index, "status", row) or "unknown" for row in bad)
    told = ", ".join(f"{number(n)} {kind}" for kind, n in kinds.most_common())
    state = f"{plural(len(bad), 'file')} cannot be read ({told})." if bad else "Every one can be read."
    return f"{', '.join(words)}. {state}"


def _formats(index: Index) -> Content:
    if not _known(index, "format"):
        return None
    counts = Counter(value for value in index.column("format") if value).most_common()
    if not counts:
        return None
    top = sum(count for _, count in counts)
    rows = [charts.Bar(name, f"{number(n)} ({share(n / top)})", (("c1", n / top),)) for name, n in counts[:8]]
    more = f"{number(len(counts) - 8)} rarer formats are not shown." if len(counts) > 8 else None
    return figure(charts.bars(rows, label="Formats", top=1.0, unit=f"{SPACE}%", scale=100), "Formats", more)


def _sides(index: Index) -> Content:
    """Histogram of the shorter side, which decides how sharp a crop can be."""
    if not (_known(index, "width") and _known(index, "height")):
        return None
    sizes = [s for s in zip(index.column("width"), index.column("height")) if is_number(s[0]) and is_number(s[1])]
    if not sizes:
        return None
    short = np.array([min(size) for size in sizes])
    (width, height), most = Counter(sizes).most_common(1)[0]
    low, half, high = (number(int(v)) for v in (short.min(), np.median(short), short.max()))
    said = f"From {low} to {high} pixels, half of them above {half}."
    if most > 0.2 * len(sizes):
        said += f" {share(most / len(sizes))} are {number(width)} by {number(height)}."
    edges = _edges(float(short.min()), float(short.max()))
    counts = np.histogram(short, edges)[0].tolist()
    drawing = charts.columns(counts, edges, label=f"Histogram of the shorter side. {said}", unit=" pixels")
    return figure(drawing, "Shorter side, in pixels", said)


def _edges(low: float, high: float) -> list[float]:
    """Round numbers from `low` to beyond `high`; powers of two where sizes differ much."""
    if high > 16 * max(low, 1.0):
        first, last = int(np.floor(np.log2(max(low, 1.0)))), int(np.floor(np.log2(high))) + 1
        return [2.0**i for i in range(first, last + 1)]
    at = charts.ticks(low, max(high, low + 8), 10, whole=True)
    step = at[1] - at[0]
    edges = [at[0] - step, *at] if at[0] > low else list(at)
    while edges[-1] <= high:
        edges.append(edges[-1] + step)
    return edges


def _identical(index: Index) -> Content:
    if not _known(index, "sha256"):
        return None
    rows_of = defaultdict(list)
    for row, digest in enumerate(index.column("sha256")):
        if digest:
            rows_of[digest].append(row)
    groups = [rows for rows in rows_of.values() if len(rows) > 1]
    if not groups:
        return h("p", "No two files are byte for byte the same.", class_="prose")
    copies = sum(len(rows) - 1 for rows in groups)
    who = f"{plural(copies, 'file')} {'is' if copies == 1 else 'are'}"
    said = f"{who} byte for byte a copy of another, in {plural(len(groups), 'group')}."
    groups.sort(key=len, reverse=True)
    rows = [(_names(index, g), number(len(g))) for g in groups[:GROUPS]]
    title = "The largest groups of identical files" if len(groups) > GROUPS else "Groups of identical files"
    return join(h("p", said, class_="prose"), folded(title, table(title, ("files", "count"), rows)))


def _names(index: Index, rows: list[int]) -> str:
    return ", ".join(index.path(row) for row in rows[:4]) + (" …" if len(rows) > 4 else "")


def _broken(index: Index) -> list[int]:
    if not _known(index, "status"):
        return []
    return [row for row, status in enumerate(index.column("status")) if status not in (None, "ok")]


def _cell(index: Index, name: str, row: int) -> Content:
    return index.table[name][row].as_py() if _known(index, name) else None


def _known(index: Index, name: str) -> bool:
    return name in index.table.column_names


def _has(one: Artifact) -> bool:
    return (one.folder / "images.parquet").is_file()


def _simple(value: object) -> bool:
    return isinstance(value, str) or is_number(value) or isinstance(value, bool)
