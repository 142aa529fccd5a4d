"""The story of a selection: what each stage let through, and examples of what it decided."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from troodon.images.index import Index
from troodon.report import charts
from troodon.report.artifacts import Artifact
from troodon.report.markup import (
    MINUS,
    MISSING,
    SPACE,
    Card,
    Content,
    Markup,
    Part,
    figure,
    folded,
    h,
    is_number,
    join,
    legend,
    note,
    number,
    share,
    table,
)
from troodon.report.thumbnails import Frame, spread, thumbnail
from troodon.text import plural

GROUPS, MEMBERS = 8, 6
QUERIES, HITS = 8, 6
OFF_TOPIC = 22
REASONS = 12
STAGES = ("decode", "exact", "hash", "duplicate", "benchmark", "retrieve")  # in the order in which they decide


def selection(artifacts: list[Artifact]) -> Part | None:
    """Funnel, threshold, calibration, duplicate groups, retrieved neighbours, what was left out. None without one."""
    ledgers = [(one, Index.load(one.folder / "images.parquet")) for one in artifacts
               if (one.folder / "images.parquet").is_file()]  # fmt: skip
    if not ledgers:
        return None
    body, total, kept = [], 0, 0
    for one, ledger in ledgers:
        total, kept = total + len(ledger), kept + sum(ledger.column("kept"))
        body.append(h("h3", one.name) if len(ledgers) > 1 else None)
        body.append(_one(one, ledger))
    card = Card("kept by curation", number(kept), f"of {number(total)}, {share(kept / total)}" if total else "")
    return Part(
        "selection", "What was kept, and why", join(body), (card,), f"curation kept {number(kept)} of {number(total)}"
    )


def _one(one: Artifact, ledger: Index) -> Markup:
    summary = one.json("summary.json")
    summary = summary if isinstance(summary, dict) else {}
    stages = _stages(summary, ledger)
    return join(
        _pools(ledger),
        _funnel(stages),
        _numbers(summary),
        _groups(one.folder / "groups.parquet", ledger),
        _hits(one.folder / "hits.parquet", ledger),
        _left_out(ledger),
        _reasons(ledger),
    )


def _pools(ledger: Index) -> Content:
    seen, kept = Counter(ledger.column("pool")), Counter()
    for pool, keep in zip(ledger.column("pool"), ledger.column("kept")):
        kept[pool] += keep
    told = [
        f"{number(kept[pool])} of {number(n)} {pool or 'other'} images" for pool, n in sorted(seen.items(), key=str)
    ]
    return h(
        "p", f"Kept: {' and '.join(told)}. No image was copied; each one left out has its reason below.", class_="prose"
    )


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
        says = f"{number(after)} ({MINUS}{number(lost)})" if lost else number(after)
        bars.append(charts.Bar(name, says, (("c1", float(after)), ("drop", float(max(lost, 0))))))
    drawing = charts.bars(bars, label="Images after each stage", top=float(top))
    key = legend(("c1", "goes on"), ("drop", "left out by this stage"))
    head = ("stage", "what it leaves out", "in", "left out", "out")
    if not any(row[1] for row in rows):
        head, rows = (head[0], *head[2:]), [(row[0], *row[2:]) for row in rows]
    return join(
        figure(join(key, drawing), "Stage by stage"), table("The same in numbers", head, rows, text=len(head) - 3)
    )


def _numbers(summary: dict) -> Content:
    """Threshold, calibration, and whatever else the summary holds: single numbers in a table, rates as bars."""
    single, charts_ = [], []
    for key, value in summary.items():
        if key == "stages":
            continue
        if isinstance(value, dict):
            flat = {k: v for k, v in value.items() if _simple(v)}
            single += [(f"{_words(key)}: {_words(k)}", number(v)) for k, v in flat.items() if _words(k) != _words(key)]
            for name, inner in value.items():
                if isinstance(inner, dict) and inner and all(is_number(v) for v in inner.values()):
                    title = f"{_words(key)}: {_words(name)}"
                    if all(0 <= v <= 1 for v in inner.values()):
                        charts_.append(_rates(title.capitalize(), inner))
                    else:
                        single += [(f"{title}, {_words(k)}", number(v)) for k, v in inner.items()]
        elif _simple(value):
            single.append((_words(key), number(value)))
    shown = [table("Numbers of the selection", ("quantity", "value"), single)] if single else []
    return h("div", shown, charts_, class_="grid two") if shown or charts_ else None


def _rates(title: str, values: dict) -> Markup:
    rows = [
        charts.Bar(_words(k), share(v), (("c1", float(v)),)) for k, v in sorted(values.items(), key=lambda kv: -kv[1])
    ]
    return figure(charts.bars(rows, label=title, top=1.0, unit=f"{SPACE}%", scale=100), title)


def _groups(path: Path, ledger: Index) -> Content:
    """Near-duplicates, from the most doubtful group to the surest: where the mistakes would be comes first."""
    table_ = _table(path, len(ledger))
    if table_ is None:
        return None
    # Only what is shown is made into records: there may be millions of groups.
    names, group_of, sizes = np.unique(table_["group"].to_numpy(), return_inverse=True, return_counts=True)
    doubt = np.ones(len(names))
    np.minimum.at(doubt, group_of, np.nan_to_num(table_["score"].to_numpy().astype(float), nan=1.0))
    order = [int(g) for g in np.lexsort((names, doubt)) if sizes[g] > 1]
    if not order:
        return None
    members = _records(table_, "group", [int(names[g]) for g in spread(order, GROUPS)])
    groups = [sorted(g, key=lambda r: (not r["kept"], -_score(r), r["row"])) for g in members.values()]
    shown = []
    for group in groups:
        cells = [thumbnail(ledger, group[0]["row"], Frame("kept", True))]
        # A long group shows its ends: what is most like the one kept, and what is least.
        cells += [thumbnail(ledger, r["row"], Frame("kept" if r["kept"] else _cosine(r), r["kept"]))
                  for r in spread(group[1:], MEMBERS - 1)]  # fmt: skip
        hidden = len(group) - len(cells)
        shown.append(
            h("div", cells, h("span", f"+ {number(hidden)}", class_="more") if hidden else None, class_="strip")
        )
    caption = (
        f"{plural(len(order), 'group')} in all; shown are {number(len(shown))}, from the most doubtful to the surest. "
        "The framed image is kept in place of the others. Below each of those: its cosine with the framed one."
    )
    return figure(h("div", shown, class_="groups"), "Near-duplicates", caption)


def _hits(path: Path, ledger: Index) -> Content:
    """What curated images brought in."""
    table_ = _table(path, len(ledger), "query")
    if table_ is None:
        return None
    queries = np.unique(table_["query"].to_numpy())
    shown = []
    for query, hits in _records(table_, "query", [int(q) for q in spread(list(queries), QUERIES)]).items():
        cells = [thumbnail(ledger, query, Frame("curated", True)), h("span", "→", class_="arrow", aria_hidden="true")]
        nearest = sorted(hits, key=lambda r: r["rank"])[:HITS]
        cells += [thumbnail(ledger, r["row"], Frame(_cosine(r))) for r in nearest]
        shown.append(h("div", cells, class_="strip"))
    caption = (
        f"Left, framed: a curated image. Right: the images nearest to it among the others, with their cosine. "
        f"{plural(len(queries), 'curated image')} in all, {number(len(shown))} of them shown."
    )
    return figure(h("div", shown, class_="groups"), "Retrieved neighbours", caption)


def _left_out(ledger: Index) -> Content:
    """Images that no curated image asked for."""
    stages, kept = ledger.column("stage"), ledger.column("kept")
    rows = [row for row in range(len(ledger)) if stages[row] == "retrieve" and not kept[row]]
    if not rows:
        return None
    strip = h("div", (thumbnail(ledger, row) for row in spread(rows, OFF_TOPIC)), class_="strip")
    caption = f"{plural(len(rows), 'image')} not near enough to any curated one; evenly spaced examples."
    return figure(strip, "Not near enough", caption)


def _reasons(ledger: Index) -> Content:
    """How often each reason was given; numbers such as cosines do not make two reasons of one."""
    counts = Counter()
    for stage, reason, kept in zip(ledger.column("stage"), ledger.column("reason"), ledger.column("kept")):
        if not kept:
            counts[stage or "", re.sub(r"-?\d+\.\d+", "…", reason or "")] += 1
    if not counts:
        return None
    rows = [(stage, reason, number(n)) for (stage, reason), n in counts.most_common(REASONS)]
    title = "Why images were left out"
    more = note(f"and {number(len(counts) - REASONS)} rarer reasons.") if len(counts) > REASONS else None
    return folded(title, table(title, ("stage", "reason", "images"), rows, text=2), more)


def _table(path: Path, rows: int, *also: str) -> pa.Table | None:
    """A table whose column `row` (and `also`) points into the ledger; None where it is missing or empty."""
    if not path.is_file():
        return None
    found = pq.read_table(path)
    inside = np.ones(found.num_rows, dtype=bool)
    for name in ("row", *also):
        values = found[name].to_numpy()
        inside &= (values >= 0) & (values < rows)
    return found.filter(pa.array(inside)) if inside.any() else None


def _records(table_: pa.Table, key: str, chosen: list[int]) -> dict[int, list[dict]]:
    """The records of the `chosen` values of the column `key`, in that order."""
    out: dict[int, list[dict]] = {value: [] for value in chosen}
    for record in table_.filter(pa.array(np.isin(table_[key].to_numpy(), chosen))).to_pylist():
        out[record[key]].append(record)
    return out


def _cosine(record: dict) -> str:
    return f"{record['score']:.2f}" if is_number(record["score"]) else MISSING


def _score(record: dict) -> float:
    return record["score"] if is_number(record["score"]) else 1.0


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _simple(value: object) -> bool:
    return isinstance(value, str | bool) or is_number(value)
