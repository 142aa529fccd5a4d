"""What a scanned index says of a set of images: counts, sizes, broken files, images that are there twice.

`summarise` gives plain numbers, strings and lists; `render` says them to people.
"""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SHOWN = 10  # broken files, or groups, in what people read

Groups = list[list[int]]  # rows of images that are the same


def summarise(table: pa.Table) -> dict:
    """What a scanned table says of the set: see `render` for each part in words."""
    ok = table.filter(pc.equal(table["status"], "ok"))
    bad = table.filter(pc.not_equal(table["status"], "ok")).select(["path", "status", "reason"])
    alike = groups(table, "pixels")
    return {
        "images": table.num_rows,
        "ok": ok.num_rows,
        "bytes": pc.sum(pc.max_element_wise(table["length"], 0)).as_py() or 0,
        "broken": bad.to_pylist(),
        "formats": _counts(ok["format"]),
        "modes": _counts(ok["mode"]),
        "channels": _counts(ok["channels"]),
        "sizes": {
            "width": _range(ok["width"]),
            "height": _range(ok["height"]),
            "megapixels": _range(pc.divide(pc.multiply(ok["width"], ok["height"]).cast(pa.float64()), 1e6)),
        },
        "labels": _counts(table["label"]),
        "splits": _counts(table["split"]),
        "identical": _same(table, groups(table, "sha256"), None),
        "same_pixels": _same(table, alike, "sha256"),
        "conflicts": _conflicts(table, alike),
    }


def groups(table: pa.Table, column: str) -> Groups:
    """Rows of readable images that have the same value there, in the order of their first."""
    keys = pc.if_else(pc.equal(table["status"], "ok"), table[column], None)
    counts = pc.value_counts(keys.drop_null())
    again = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    rows = np.flatnonzero(pc.is_in(keys, again).fill_null(False).to_numpy() & keys.is_valid().to_numpy())
    found: dict[str, list[int]] = defaultdict(list)
    for row, key in zip(rows.tolist(), keys.take(pa.array(rows)).to_pylist()):
        found[key].append(row)
    return list(found.values())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, the most frequent first; null is not one."""
    counts = pc.value_counts(column.drop_null()).to_pylist()
    return {str(c["values"]): c["counts"] for c in sorted(counts, key=lambda c: (-c["counts"], str(c["values"])))}


def _range(column: pa.ChunkedArray) -> dict | None:
    if not len(column):
        return None
    ends = pc.min_max(column).as_py()
    return {"min": ends["min"], "median": pc.quantile(column, 0.5)[0].as_py(), "max": ends["max"]}


def _same(table: pa.Table, same: Groups, apart: str | None) -> dict:
    """Groups of images that are the same. A pair is two images of one group; pairs across splits leak.

    With `apart`, only of pairs that differ in that column, and only groups that have one.
    """
    across, pairs = Counter[str](), 0
    kept: Groups = []
    crossing = []
    for group in same:
        rows = pa.array(group)
        splits = table["split"].take(rows).to_pylist()
        values = table[apart].take(rows).to_pylist() if apart else None
        if not (count := _pairs(len(group), values and Counter(values))):
            continue
        mine = Counter[str]()
        known = sorted(set(splits) - {None})
        for at, a in enumerate(known):
            for b in known[at + 1 :]:
                of_a, of_b = ([v for s, v in zip(splits, values or group) if s == name] for name in (a, b))
                alike = sum(n * Counter(of_b)[v] for v, n in Counter(of_a).items())
                mine[f"{a} / {b}"] += len(of_a) * len(of_b) - alike
        pairs, across = pairs + count, across + mine
        kept.append(group)
        crossing.append(bool(+mine))
    paths = [table["path"].take(pa.array(group)).to_pylist() for group in kept]
    shown = sorted(range(len(kept)), key=lambda g: (not crossing[g], paths[g][0]))[:SHOWN]
    return {
        "groups": len(kept),
        "images": sum(map(len, kept)),
        "pairs": pairs,
        "pairs_across_splits": across.total(),
        "by_splits": dict(across),
        "examples": [paths[g] for g in shown],
    }


def _pairs(images: int, alike: Counter | None) -> int:
    """Pairs among so many images, but for those of images that are alike."""
    return images * (images - 1) // 2 - sum(n * (n - 1) // 2 for n in (alike or {}).values())


def conflicting(table: pa.Table, same: Groups) -> Groups:
    """Those of the groups in which two images have different labels."""
    return [g for g in same if len(set(table["label"].take(pa.array(g)).to_pylist()) - {None}) > 1]


def _conflicts(table: pa.Table, same: Groups) -> dict:
    torn = conflicting(table, same)
    shown = [table.select(["path", "label"]).take(pa.array(group)).to_pylist() for group in torn[:SHOWN]]
    return {"groups": len(torn), "images": sum(map(len, torn)), "examples": shown}


def render(summary: dict) -> str:
    """The summary as a few lines of plain text."""
    labels = summary["labels"]
    statuses = _counts(pa.chunked_array([pa.array([entry["status"] for entry in summary["broken"]], pa.string())]))
    rows = [
        ("images", f"{summary['images']:,}, {summary['bytes'] / 1e6:,.1f} MB"),
        ("broken", f"{len(summary['broken']):,} ({_list(statuses)})" if statuses else "none: all of them decode"),
        ("formats", _list(summary["formats"])),
        ("modes", _list(summary["modes"])),
        ("channels", _list({f"{channels}:": count for channels, count in summary["channels"].items()})),
    ]
    for name, unit in (("width", "px"), ("height", "px"), ("megapixels", "MP")):
        if size := summary["sizes"][name]:
            low, median, high = (f"{size[key]:,.4g}" for key in ("min", "median", "max"))
            rows.append((name, f"{low} {unit}" if low == high else f"{low} to {high} {unit}, median {median}"))
    if summary["splits"]:
        rows.append(("splits", _list(summary["splits"]) + _without(summary, "splits")))
    if labels:
        fewest, most = min(labels.values()), max(labels.values())
        each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        rows.append(
            ("labels", f"{_many(len(labels), 'class', 'classes')} of {each} images{_without(summary, 'labels')}")
        )
    rows.append(("identical", _again(summary["identical"], "byte-identical images") or "no two files are the same"))
    if said := _again(summary["same_pixels"], "other files with the same pixels"):
        rows.append(("pixels", said))
    torn = summary["conflicts"]
    if torn["groups"]:
        rows.append(("conflicts", f"{_many(torn['groups'], 'group')} of identical images with different labels"))
    if "seconds" in summary:
        rows.append(("time", f"{summary['seconds']:,.1f} s, {_many(summary['read'], 'image')} read"))
    lines = [f"{name:<11} {text}" for name, text in rows]
    lines += _listing(
        "broken files",
        [f"{b['path']}: {b['status']}, {b['reason']}" for b in summary["broken"]],
        len(summary["broken"]),
    )
    for name, title in (("identical", "byte-identical"), ("same_pixels", "the same pixels in other bytes")):
        lines += _listing(title, [" = ".join(g) for g in summary[name]["examples"]], summary[name]["groups"])
    pairs = [" = ".join(f"{one['path']} ({one['label']})" for one in group) for group in torn["examples"]]
    return "\n".join(lines + _listing("identical, but labelled differently", pairs, torn["groups"]))


def _again(same: dict, what: str) -> str:
    if not same["groups"]:
        return ""
    text = f"{_many(same['pairs'], 'pair')} of {what} ({same['images']:,} images in {_many(same['groups'], 'group')})"
    if same["pairs_across_splits"]:
        text += f"; across splits {_many(same['pairs_across_splits'], 'pair')} ({_list(same['by_splits'])})"
    return text


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _list(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:SHOWN])
    return shown + (f", {len(counts) - SHOWN} more" if len(counts) > SHOWN else "") or "none"


def _without(summary: dict, name: str) -> str:
    missing = summary["images"] - sum(summary[name].values())
    return f", none for {missing:,}" if missing else ""


def _listing(title: str, lines: list[str], total: int) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {total - SHOWN:,} more"] if total > SHOWN else []
    return ["", title, *(f"  {line}" for line in lines[:SHOWN]), *more]
