"""The inventory of a set of images: every file read and decoded once, and what that says about the set.

The index that comes out has these columns more, and is what later stages read:

    status    "ok", what BadImage says ("empty", "not an image", "truncated", "too large", "decode error"), or
              "unreadable" where the file itself could not be read
    reason    why not, in one line; null where ok
    format, mode, width, height    of the upright picture, from the header; null where there is none
    sha256    of the bytes, in hexadecimal: equal for byte-identical files; null where unreadable
"""

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from troodon import config, run
from troodon.data.decode import BadImage, decode, probe, threads_or_all
from troodon.data.index import SCHEMA, Index
from troodon.data.sources import open_source

FOUND = pa.schema(
    [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("sha256", pa.string()),
    ]
)
CHUNK = 32  # images per task: enough to make handing it over cheap
SHOWN = 10  # broken files, or groups, in what people read


def scan_to(
    paths: Sequence[str | Path], out: Path, threads: int, progress: Callable[[int, int], None] | None = None
) -> dict:
    """Scan these sources into the index artifact `out`, unless it is there already; the summary.

    Raises UsageError for sources that cannot be opened and for an `out` that holds something else.
    """
    index = open_source(*paths)
    settings = {"sources": [str(Path(p).absolute()) for p in paths]}
    fingerprint = config.fingerprint(settings, contents(index))
    if not run.is_done(out, "index", fingerprint, settings):
        table = scan(index, threads, progress)
        with run.publish(out, "index", fingerprint, settings) as folder:
            Index(table).save(folder / "images.parquet")
            run.write_json(folder / "summary.json", summarise(table))
    return run.read_json(out / "summary.json")


def contents(index: Index) -> str:
    """A hash of what an index lists: names, places, lengths, labels and splits. The pictures are not read."""
    digest = hashlib.sha256()
    for name in SCHEMA.names:
        digest.update("\0".join(map(str, index.column(name))).encode() + b"\n")
    return digest.hexdigest()


def scan(index: Index, threads: int, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """The index with what reading every image once has found; `progress(done, total)` is told now and then."""
    starts = range(0, len(index), CHUNK)
    rows: list[tuple] = []
    pool = ThreadPoolExecutor(threads_or_all(threads))
    try:
        for part in pool.map(lambda at: [_examine(index, r) for r in range(at, min(at + CHUNK, len(index)))], starts):
            rows += part
            if progress is not None:
                progress(len(rows), len(index))
    finally:
        pool.shutdown(cancel_futures=True)
    table = index.table.select(SCHEMA.names)
    for field, column in zip(FOUND, zip(*rows) if rows else [()] * len(FOUND)):
        table = table.append_column(field, pa.array(column, field.type))
    return table


def _examine(index: Index, row: int) -> tuple:
    """One row of FOUND."""
    try:
        data = index.read(row)
    except OSError as error:
        return ("unreadable", error.strerror or str(error), None, None, None, None, None)
    sha256, header = hashlib.sha256(data).hexdigest(), (None, None, None, None)
    try:
        seen = probe(data)
        header = (seen.format, seen.mode, seen.width, seen.height)
        decode(data, channels=None)
    except BadImage as bad:
        return (bad.status, bad.reason, *header, sha256)
    return ("ok", None, *header, sha256)


def summarise(table: pa.Table) -> dict:
    """What a scanned table says of the set: see `render` for each part in words. Plain numbers, strings and lists."""
    column = {name: table[name].to_pylist() for name in table.column_names}
    ok = [row for row, status in enumerate(column["status"]) if status == "ok"]
    groups = defaultdict(list)
    for row in ok:
        groups[column["sha256"][row]].append(row)
    identical = [group for group in groups.values() if len(group) > 1]
    return {
        "images": table.num_rows,
        "ok": len(ok),
        "bytes": sum(column["length"]),
        "broken": [
            {"path": path, "status": status, "reason": reason}
            for path, status, reason in zip(column["path"], column["status"], column["reason"])
            if status != "ok"
        ],
        "formats": _counts(column["format"][row] for row in ok),
        "modes": _counts(column["mode"][row] for row in ok),
        "sizes": {
            "width": _range([column["width"][row] for row in ok]),
            "height": _range([column["height"][row] for row in ok]),
            "megapixels": _range([column["width"][row] * column["height"][row] / 1e6 for row in ok]),
        },
        "labels": _counts(column["label"]),
        "splits": _counts(column["split"]),
        "identical": _identical(identical, column["path"], column["split"]),
        "conflicts": _conflicts(identical, column["path"], column["label"]),
    }


def _counts(values: Sequence[str | None] | Iterator[str | None]) -> dict[str, int]:
    """How often each value occurs, the most frequent first; null is not one."""
    return dict(sorted(Counter(v for v in values if v is not None).items(), key=lambda kv: (-kv[1], kv[0])))


def _range(values: list) -> dict | None:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else None


def _identical(groups: list[list[int]], paths: list[str], splits: list[str | None]) -> dict:
    """Groups of byte-identical images. A pair is two images of one group; pairs across splits leak one into another."""
    across: Counter[str] = Counter()
    crossing = []
    for group in groups:
        sizes = sorted(Counter(splits[row] for row in group if splits[row] is not None).items())
        crossing.append(len(sizes) > 1)
        for at, (a, n) in enumerate(sizes):
            for b, m in sizes[at + 1 :]:
                across[f"{a} / {b}"] += n * m
    shown = sorted(range(len(groups)), key=lambda g: (not crossing[g], paths[groups[g][0]]))[:SHOWN]
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "pairs": sum(len(group) * (len(group) - 1) // 2 for group in groups),
        "pairs_across_splits": across.total(),
        "by_splits": dict(across),
        "examples": [[paths[row] for row in groups[g]] for g in shown],
    }


def _conflicts(groups: list[list[int]], paths: list[str], labels: list[str | None]) -> dict:
    """Groups of byte-identical images of which two have different labels."""
    torn = [group for group in groups if len({labels[row] for row in group} - {None}) > 1]
    examples = [[{"path": paths[row], "label": labels[row]} for row in group] for group in torn[:SHOWN]]
    return {"groups": len(torn), "images": sum(map(len, torn)), "examples": examples}


def render(summary: dict) -> str:
    """The summary as a few lines of plain text."""
    same, torn, labels = summary["identical"], summary["conflicts"], summary["labels"]
    statuses = _counts(entry["status"] for entry in summary["broken"])
    rows = [
        ("images", f"{summary['images']:,}, {summary['bytes'] / 1e6:,.1f} MB"),
        ("broken", f"{len(summary['broken']):,} ({_list(statuses)})" if statuses else "none: all of them decode"),
        ("formats", _list(summary["formats"])),
        ("modes", _list(summary["modes"])),
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
    if same["groups"]:
        text = f"{_many(same['pairs'], 'pair')} of byte-identical images"
        text += f" ({same['images']:,} images in {_many(same['groups'], 'group')})"
        if same["pairs_across_splits"]:
            text += f"; across splits {_many(same['pairs_across_splits'], 'pair')} ({_list(same['by_splits'])})"
        rows.append(("identical", text))
    else:
        rows.append(("identical", "no two files are byte-identical"))
    if torn["groups"]:
        rows.append(("conflicts", f"{_many(torn['groups'], 'group')} of identical images with different labels"))
    lines = [f"{name:<11} {text}" for name, text in rows]
    lines += _listing(
        "broken files",
        [f"{b['path']}: {b['status']}, {b['reason']}" for b in summary["broken"]],
        len(summary["broken"]),
    )
    lines += _listing("byte-identical", [" = ".join(paths) for paths in same["examples"]], same["groups"])
    pairs = [" = ".join(f"{one['path']} ({one['label']})" for one in group) for group in torn["examples"]]
    return "\n".join(lines + _listing("identical, but labelled differently", pairs, torn["groups"]))


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
