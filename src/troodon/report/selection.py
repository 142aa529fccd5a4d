"""The section about selections: what each stage kept, and examples of its decisions."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from troodon.images.carry_out import moved_files
from troodon.images.index import Index
from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.copies import copies_figure, doubtful_figure, leaks_figure, marked_figure
from troodon.report.markup import (
    MINUS,
    MISSING,
    SPACE,
    Card,
    Content,
    Markup,
    Part,
    Section,
    details,
    figure,
    h,
    is_number,
    join,
    legend,
    note,
    number,
    percent,
    table,
)
from troodon.report.thumbnails import Frame, spread, thumbnail
from troodon.text import plural

QUERIES, HITS = 8, 6
NOT_RETRIEVED = 22
REASONS = 12
STAGES = ("decode", "exact", "hash", "colour", "duplicate", "benchmark", "retrieve")  # in the order of the pipeline


def selection_section(artifacts: list[Artifact]) -> Section | None:
    """Funnel, threshold, calibration, duplicate groups, retrieved neighbours, dropped images. None without one."""
    ledgers = [(artifact, Index.load(artifact.folder / "images.parquet")) for artifact in artifacts
               if (artifact.folder / "images.parquet").is_file()]  # fmt: skip
    if not ledgers:
        return None
    body, parts, total, kept = [], list[Part](), 0, 0
    for artifact, ledger in ledgers:
        total, kept = total + len(ledger), kept + sum(ledger.column("kept"))
        body.append(h("h3", artifact.name) if len(ledgers) > 1 else None)
        content, further = _selection_body(artifact, _where_moved(artifact, ledger))
        body.append(content)
        parts += further
    card = Card("kept by curation", number(kept), f"of {number(total)}, {percent(kept / total)}" if total else "")
    clause = f"curation kept {number(kept)} of {number(total)}"
    return Section("selection", "What was kept, and why", join(body), (card,), clause, tuple(parts))


def _where_moved(artifact: Artifact, ledger: Index) -> Index:
    """The ledger with the present places of images that `apply` has moved."""
    if not (moved := moved_files(artifact.folder)):
        return ledger
    places = [moved.get(file, file) for file in ledger.column("container")]
    at = ledger.table.schema.get_field_index("container")
    return replace(ledger, table=ledger.table.set_column(at, "container", pa.array(places, pa.string())))


def _selection_body(artifact: Artifact, ledger: Index) -> tuple[Markup, list[Part]]:
    summary = artifact.json("summary.json")
    summary = summary if isinstance(summary, dict) else {}
    stages = _stages(summary, ledger)
    copies, parts = copies_figure(ledger, artifact.folder)
    leaks, more = leaks_figure(ledger, artifact.folder)
    body = join(
        _pools(ledger),
        _funnel(stages),
        doubtful_figure(ledger, artifact.folder),
        copies,
        leaks,
        marked_figure(ledger),
        _retrieved(artifact.folder / "hits.parquet", ledger),
        _not_retrieved(ledger),
        _summary_numbers(summary),
        _reasons(ledger),
    )
    return body, [*parts, *more]


def _pools(ledger: Index) -> Content:
    total, kept = Counter(ledger.column("pool")), Counter()
    for pool, keep in zip(ledger.column("pool"), ledger.column("kept")):
        kept[pool] += keep
    counts = [
        f"{number(kept[pool])} of {number(n)} {pool or 'other'} images" for pool, n in sorted(total.items(), key=str)
    ]
    text = f"Kept: {' and '.join(counts)}. No image was copied; each one left out has its reason below."
    return h("p", text, class_="prose")


def _stages(summary: dict, ledger: Index) -> list[dict]:
    """The funnel as recorded, or counted from the ledger where it is not."""
    stages = [s for s in summary.get("stages") or [] if isinstance(s, dict) and is_number(s.get("in"))]
    if stages:
        return stages
    dropped = Counter(s for s, keep in zip(ledger.column("stage"), ledger.column("kept")) if not keep)
    left = len(ledger)
    for name in [*STAGES, *sorted(set(map(str, dropped)) - set(STAGES))]:
        if dropped[name]:
            stages.append({"name": name, "in": left, "dropped": dropped[name], "out": left - dropped[name]})
            left -= dropped[name]
    return stages


def _funnel(stages: list[dict]) -> Content:
    if not stages:
        return None
    rows, bars, top = [], [], max(max(s["in"] for s in stages), 1)
    for stage in stages:
        name, before = str(stage.get("name", "stage")), stage["in"]
        after = stage["out"] if is_number(stage.get("out")) else before - (stage.get("dropped") or 0)
        lost = stage["dropped"] if is_number(stage.get("dropped")) else before - after
        rows.append((name, stage.get("what"), number(before), number(lost), number(after)))
        label = f"{number(after)} ({MINUS}{number(lost)})" if lost else number(after)
        bars.append(charts.Bar(name, label, (("c1", float(after)), ("drop", float(max(lost, 0))))))
    drawing = charts.bar_chart(bars, label="Images after each stage", top=float(top))
    key = legend(("c1", "goes on"), ("drop", "left out by this stage"))
    head = ("stage", "what it leaves out", "in", "left out", "out")
    if not any(row[1] for row in rows):
        head, rows = (head[0], *head[2:]), [(row[0], *row[2:]) for row in rows]
    return join(
        figure(join(key, drawing), "Stage by stage"), table("The same in numbers", head, rows, text=len(head) - 3)
    )


def _summary_numbers(summary: dict) -> Content:
    """Threshold, calibration and all else in the summary: single numbers in a table, rates as bars."""
    single, rate_charts = [], []
    for key, value in summary.items():
        if key == "stages":
            continue
        if isinstance(value, dict):
            scalars = {k: v for k, v in value.items() if _is_scalar(v)}
            title = _plain(key)
            single += [(f"{title}: {_plain(k)}", number(v)) for k, v in scalars.items() if _plain(k) != title]
            for name, inner in value.items():
                if isinstance(inner, dict) and inner and all(is_number(v) for v in inner.values()):
                    title = f"{_plain(key)}: {_plain(name)}"
                    if all(0 <= v <= 1 for v in inner.values()):
                        rate_charts.append(_rate_chart(title.capitalize(), inner))
                    else:
                        single += [(f"{title}, {_plain(k)}", number(v)) for k, v in inner.items()]
        elif _is_scalar(value):
            single.append((_plain(key), number(value)))
    shown = [table("Numbers of the selection", ("quantity", "value"), single)] if single else []
    return h("div", shown, rate_charts, class_="grid two") if shown or rate_charts else None


def _rate_chart(title: str, values: dict) -> Markup:
    rows = [
        charts.Bar(_plain(k), percent(v), (("c1", float(v)),)) for k, v in sorted(values.items(), key=lambda kv: -kv[1])
    ]
    return figure(charts.bar_chart(rows, label=title, top=1.0, unit=f"{SPACE}%", scale=100), title)


def _retrieved(path: Path, ledger: Index) -> Content:
    """Images that were retrieved for curated ones."""
    rows_table = _read_table(path, len(ledger), "query")
    if rows_table is None:
        return None
    queries, labels = np.unique(rows_table["query"].to_numpy()), ledger.column("label")
    shown = []
    for query, hits in _records(rows_table, "query", [int(q) for q in spread(list(queries), QUERIES)]).items():
        curated = Frame(_labelled("curated", labels[query]), True)
        cells = [thumbnail(ledger, query, curated), h("span", "→", class_="arrow", aria_hidden="true")]
        nearest = sorted(hits, key=lambda r: r["rank"])[:HITS]
        cells += [thumbnail(ledger, r["row"], Frame(_labelled(_cosine_text(r), labels[r["row"]]))) for r in nearest]
        shown.append(h("div", cells, class_="strip"))
    caption = (
        f"Left, framed: a curated image. Right: the images nearest to it among the others, with their cosine. "
        f"{plural(len(queries), 'curated image')} in all, {number(len(shown))} of them shown."
    )
    return figure(h("div", shown, class_="groups"), "Retrieved neighbours", caption)


def _labelled(text: str, label: str | None) -> Content:
    """The text below an image, and its class where it has one."""
    return text if label is None else [text, h("br"), label]


def _not_retrieved(ledger: Index) -> Content:
    """Images that are near to no curated image."""
    stages, kept = ledger.column("stage"), ledger.column("kept")
    rows = [row for row in range(len(ledger)) if stages[row] == "retrieve" and not kept[row]]
    if not rows:
        return None
    strip = h("div", (thumbnail(ledger, row) for row in spread(rows, NOT_RETRIEVED)), class_="strip")
    caption = f"{plural(len(rows), 'image')} not near enough to any curated one; evenly spaced examples."
    return figure(strip, "Not near enough", caption)


def _reasons(ledger: Index) -> Content:
    """How often each reason occurs; reasons that differ only in numbers such as cosines count as one."""
    counts = Counter()
    for stage, reason, kept in zip(ledger.column("stage"), ledger.column("reason"), ledger.column("kept")):
        if not kept:
            counts[stage or "", re.sub(r"-?\d+\.\d+", "…", reason or "")] += 1
    if not counts:
        return None
    rows = [(stage, reason, number(n)) for (stage, reason), n in counts.most_common(REASONS)]
    title = "Why images were left out"
    more = note(f"and {number(len(counts) - REASONS)} rarer reasons.") if len(counts) > REASONS else None
    return details(title, table(title, ("stage", "reason", "images"), rows, text=2), more)


def _read_table(path: Path, rows: int, *also: str) -> pa.Table | None:
    """A table whose columns `row` and `also` are rows of the ledger; None where it is missing or empty."""
    if not path.is_file():
        return None
    table_ = pq.read_table(path)
    inside = np.ones(table_.num_rows, dtype=bool)
    for name in ("row", *also):
        values = table_[name].to_numpy()
        inside &= (values >= 0) & (values < rows)
    return table_.filter(pa.array(inside)) if inside.any() else None


def _records(rows_table: pa.Table, key: str, chosen: list[int]) -> dict[int, list[dict]]:
    """The records of the `chosen` values of the column `key`, in that order."""
    out: dict[int, list[dict]] = {value: [] for value in chosen}
    for record in rows_table.filter(pa.array(np.isin(rows_table[key].to_numpy(), chosen))).to_pylist():
        out[record[key]].append(record)
    return out


def _cosine_text(record: dict) -> str:
    return f"{record['score']:.2f}" if is_number(record["score"]) else MISSING


def _plain(key: object) -> str:
    return str(key).replace("_", " ")


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool) or is_number(value)
