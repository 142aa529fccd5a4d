"""The summary of a scanned dataset: counts, sizes, broken files, duplicates.

`summarise` computes it as plain numbers, strings and lists; `format_summary` writes it as text.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from troodon.images.values import of_scan
from troodon.text import plural, printable

MAX_EXAMPLES = 10  # broken files, or groups, in the text

Groups = list[list[int]]  # rows of identical images


def summarise(table: pa.Table) -> dict:
    """Summarise a scanned table; `format_summary` explains each value."""
    ok = table.filter(pc.equal(table["status"], "ok"))
    broken = table.filter(pc.not_equal(table["status"], "ok")).select(["path", "status", "reason"])
    same_pixels = duplicate_groups(table, "pixels")
    return {
        "images": table.num_rows,
        "ok": ok.num_rows,
        "bytes": pc.sum(pc.max_element_wise(table["length"], 0)).as_py() or 0,
        "broken": broken.to_pylist(),
        "formats": _counts(ok["format"]),
        "modes": _counts(ok["mode"]),
        "channels": _counts(ok["channels"]),
        "sizes": {
            "width": _range(ok["width"]),
            "height": _range(ok["height"]),
            "megapixels": _range(pc.divide(pc.multiply(ok["width"], ok["height"]).cast(pa.float64()), 1e6)),
        },
        **({"values": values} if (values := of_scan(ok)) else {}),
        "labels": _counts(table["label"]),
        "splits": _counts(table["split"]),
        "identical": _summarise_duplicates(table, duplicate_groups(table, "sha256"), None),
        "same_pixels": _summarise_duplicates(table, same_pixels, "sha256"),
        "conflicts": _summarise_conflicts(table, same_pixels),
    }


def duplicate_groups(table: pa.Table, column: str) -> Groups:
    """Groups of rows of readable images with equal values in `column`, in the order of their first rows."""
    keys = pc.if_else(pc.equal(table["status"], "ok"), table[column], None)
    counts = pc.value_counts(keys.drop_null())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    rows = np.flatnonzero(pc.is_in(keys, repeated).fill_null(False).to_numpy() & keys.is_valid().to_numpy())
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in zip(rows.tolist(), keys.take(pa.array(rows)).to_pylist()):
        groups[key].append(row)
    return list(groups.values())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """The count of each value, the most frequent first; null is not counted."""
    counts = pc.value_counts(column.drop_null()).to_pylist()
    return {str(c["values"]): c["counts"] for c in sorted(counts, key=lambda c: (-c["counts"], str(c["values"])))}


def _range(column: pa.ChunkedArray) -> dict | None:
    if not len(column):
        return None
    extremes = pc.min_max(column).as_py()
    return {"min": extremes["min"], "median": pc.quantile(column, 0.5)[0].as_py(), "max": extremes["max"]}


def _summarise_duplicates(table: pa.Table, groups: Groups, distinct: str | None) -> dict:
    """Summarise groups of identical images. A pair is two images of one group; a pair across splits is a leak.

    `distinct` names a column: then only pairs that differ in it count, and only groups with such a pair.
    """
    across, pairs = Counter[str](), 0
    kept: Groups = []
    is_across = []
    for group in groups:
        rows = pa.array(group)
        splits = table["split"].take(rows).to_pylist()
        values = table[distinct].take(rows).to_pylist() if distinct else None
        if not (count := _pair_count(len(group), values and Counter(values))):
            continue
        group_across = Counter[str]()
        for a, b in itertools.combinations(sorted(set(splits) - {None}), 2):
            in_a, in_b = ([v for s, v in zip(splits, values or group) if s == name] for name in (a, b))
            equal = sum(n * Counter(in_b)[v] for v, n in Counter(in_a).items())
            group_across[f"{a} / {b}"] += len(in_a) * len(in_b) - equal
        pairs, across = pairs + count, across + group_across
        kept.append(group)
        is_across.append(bool(+group_across))
    paths = [table["path"].take(pa.array(group)).to_pylist() for group in kept]
    examples = sorted(range(len(kept)), key=lambda g: (not is_across[g], paths[g][0]))[:MAX_EXAMPLES]
    return {
        "groups": len(kept),
        "images": sum(map(len, kept)),
        "pairs": pairs,
        "pairs_across_splits": across.total(),
        "by_splits": dict(across),
        "examples": [paths[g] for g in examples],
    }


def _pair_count(images: int, equal: Counter | None) -> int:
    """The number of pairs of `images` images, without pairs of equal ones; `equal` counts each value."""
    return images * (images - 1) // 2 - sum(n * (n - 1) // 2 for n in (equal or {}).values())


def _summarise_conflicts(table: pa.Table, groups: Groups) -> dict:
    """Summarise the groups in which two images have different labels."""
    conflicts = [g for g in groups if len(set(table["label"].take(pa.array(g)).to_pylist()) - {None}) > 1]
    columns = table.select(["path", "label"])
    examples = [columns.take(pa.array(group)).to_pylist() for group in conflicts[:MAX_EXAMPLES]]
    return {"groups": len(conflicts), "images": sum(map(len, conflicts)), "examples": examples}


def format_summary(summary: dict) -> str:
    """The summary as a few lines of plain text."""
    labels = summary["labels"]
    statuses = _counts(pa.chunked_array([pa.array([entry["status"] for entry in summary["broken"]], pa.string())]))
    of_all = "" if summary["ok"] else "; no image here can be used"
    rows = [
        ("images", f"{summary['images']:,}, {summary['bytes'] / 1e6:,.1f} MB"),
        (
            "broken",
            f"{len(summary['broken']):,} ({_counts_text(statuses)}){of_all}" if statuses else "none: all decode",
        ),
        ("formats", _counts_text(summary["formats"])),
        ("modes", _counts_text(summary["modes"])),
        ("channels", _counts_text({f"{channels}:": count for channels, count in summary["channels"].items()})),
    ]
    if values := summary.get("values"):
        text = f"{_counts_text(values['types'])}: {values['min']:g} to {values['max']:g}"
        pairs = list(zip(*[iter(values.get("range", ()))] * 2))
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in pairs) + " by channel" * (len(pairs) > 1)
        rows.append(("values", text + (f", of which {shown} are shown" if pairs else "")))
        rows += [("range", values["advice"])] if values.get("advice") else []
    for name, unit in (("width", "px"), ("height", "px"), ("megapixels", "MP")):
        if size := summary["sizes"][name]:
            low, median, high = (f"{size[key]:,.4g}" for key in ("min", "median", "max"))
            rows.append((name, f"{low} {unit}" if low == high else f"{low} to {high} {unit}, median {median}"))
    if summary["splits"]:
        rows.append(("splits", _counts_text(summary["splits"]) + _missing_text(summary, "splits")))
    if labels:
        fewest, most = min(labels.values()), max(labels.values())
        per_class = plural(most, "image") if fewest == most else f"{fewest:,} to {plural(most, 'image')}"
        classes = plural(len(labels), "class", "classes")
        rows.append(("labels", f"{classes} of {per_class}{_missing_text(summary, 'labels')}"))
    duplicates = _duplicates_text(summary["identical"], "byte-identical images")
    rows.append(("identical", duplicates or "no two files are the same"))
    if text := _duplicates_text(summary["same_pixels"], "other files with the same pixels"):
        rows.append(("pixels", text))
    conflicts = summary["conflicts"]
    if conflicts["groups"]:
        groups = plural(conflicts["groups"], "group")
        rows.append(("conflicts", f"{groups} of identical images with different labels"))
    if "seconds" in summary:
        rows.append(("time", f"{summary['seconds']:,.1f} s, {plural(summary['read'], 'image')} read"))
    lines = [f"{name:<11} {text}" for name, text in rows]
    broken = [f"{image['path']}: {image['status']}, {image['reason']}" for image in summary["broken"]]
    lines += _example_lines("broken files", broken, len(broken))
    for name, title in (("identical", "byte-identical"), ("same_pixels", "the same pixels in other bytes")):
        lines += _example_lines(title, [" = ".join(g) for g in summary[name]["examples"]], summary[name]["groups"])
    pairs = [" = ".join(f"{image['path']} ({image['label']})" for image in group) for group in conflicts["examples"]]
    lines += _example_lines("identical images with different labels", pairs, conflicts["groups"])
    return "\n".join(map(printable, lines))


def _duplicates_text(duplicates: dict, description: str) -> str:
    if not duplicates["groups"]:
        return ""
    groups = f"{duplicates['images']:,} images in {plural(duplicates['groups'], 'group')}"
    text = f"{plural(duplicates['pairs'], 'pair')} of {description} ({groups})"
    if duplicates["pairs_across_splits"]:
        pairs = plural(duplicates["pairs_across_splits"], "pair")
        text += f"; across splits {pairs} ({_counts_text(duplicates['by_splits'])})"
    return text


def _counts_text(counts: dict[str, int]) -> str:
    first = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:MAX_EXAMPLES])
    return first + (f", {len(counts) - MAX_EXAMPLES:,} more" if len(counts) > MAX_EXAMPLES else "") or "none"


def _missing_text(summary: dict, name: str) -> str:
    missing = summary["images"] - sum(summary[name].values())
    return f", none for {missing:,}" if missing else ""


def _example_lines(title: str, lines: list[str], total: int) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {total - MAX_EXAMPLES:,} more"] if total > MAX_EXAMPLES else []
    return ["", title, *(f"  {line}" for line in lines[:MAX_EXAMPLES]), *more]
