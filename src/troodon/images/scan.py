"""The inventory of a set of images: every file read and decoded once, and what that says about the set.

The index that comes out has these columns more, and is what later stages read:

    status    "ok", what BadImage says ("empty", "not an image", "truncated", "too large", "decode error"), or
              "unreadable" where the file itself could not be read
    reason    why not, in one line; null where ok
    format, mode, channels, width, height    of the upright picture, from the header; null where there is none
    sha256    of the bytes, in hexadecimal: equal for byte-identical files; null where unreadable
    pixels    the first half of the sha256 of height, width, channels and pixels as they are decoded: equal for pictures
              that look the same, however they were saved; null where not ok
    modified  when the file that holds the image was last changed, in nanoseconds; -1 where nobody says

What was found is written to a folder beside the index now and then, so that a scan that was killed goes on; and images
that a finished index knows already, in files that have not changed since, are not read again.
"""

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from troodon import config, run
from troodon.config import UsageError
from troodon.images import containers, files
from troodon.images.decode import BadImage, decode, read_header
from troodon.images.index import SCHEMA, Index
from troodon.images.inventory import summarise
from troodon.images.reading import map_ordered, thread_count
from troodon.images.sources import open_source

SCAN_SCHEMA = pa.schema(
    [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("channels", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("sha256", pa.string()),
        ("pixels", pa.string()),
    ]
)
MODIFIED = pa.field("modified", pa.int64())
SAME = ["container", "offset", "length", "modified"]  # an image that agrees in these is as it was
CHUNK = 32  # images per task: enough to make handing it over cheap
KEPT_S = 20  # seconds, after which what was found is written down

ProgressCallback = Callable[[int, int], None]


def scan_to(paths: Sequence[str | Path], out: Path, threads: int, progress: ProgressCallback | None = None) -> dict:
    """Scan these sources into the index artifact `out`; the summary.

    An index of the same sources that is there already is brought up to date. Raises UsageError for sources that cannot
    be opened and for an `out` that holds something else.
    """
    began = time.monotonic()
    index = open_source(*paths)
    if index.datasets:
        raise UsageError(
            f"{next(iter(index.datasets))}: a data set of Python's cannot be listed in a file; pack it first"
        )
    settings = {"sources": [str(p if files.REMOTE.match(str(p)) else Path(p).absolute()) for p in paths]}
    modified = _modified(index)
    fingerprint = config.fingerprint(settings, index.content_hash(), hashlib.sha256(modified.tobytes()).hexdigest())
    there = run.read_manifest(out)
    if there is None or there["kind"] != "index" or there["settings"] != settings:
        run.is_done(out, "index", fingerprint, settings)  # tells what else is there
    elif there["fingerprint"] == fingerprint:
        return run.read_json(out / "summary.json")
    parts = out.with_name(f"{out.name}.parts")
    known = [*([pq.read_table(out / "images.parquet")] if there else []), *_parts(parts)]
    table, read = scan(index, threads, progress, modified, known, functools.partial(_keep, parts))
    with run.publish(out, "index", fingerprint, settings) as folder:
        Index(table).save(folder / "images.parquet")
        summary = summarise(table) | {"read": read, "seconds": round(time.monotonic() - began, 3)}
        run.write_json(folder / "summary.json", summary)
    shutil.rmtree(parts, ignore_errors=True)
    return summary


def scan(
    index: Index,
    threads: int,
    progress: ProgressCallback | None = None,
    modified: np.ndarray | None = None,
    known: Sequence[pa.Table] = (),
    keep: Callable[[pa.Table], None] | None = None,
) -> tuple[pa.Table, int]:
    """The index with what reading every image once has found, and how many were read.

    `known` are results of earlier scans, whose images are not read again unless they changed. `keep` is given what was
    found every KEPT_S seconds, and at the end, whatever ends it. `progress(done, total)` is told now and then.
    """
    modified = _modified(index) if modified is None else modified
    table = index.located_table().append_column(MODIFIED, pa.array(modified))
    found, rows = _remembered(table, [part for part in known if set(part.column_names) >= {*SAME, *SCAN_SCHEMA.names}])
    parts = [found]
    at, kept, since = 0, 1, time.monotonic()

    def settle() -> None:
        nonlocal kept, since
        if keep is not None and kept < len(parts):
            parts[kept:] = [fresh := pa.concat_tables(parts[kept:]).combine_chunks()]
            keep(_beside(table.take(fresh["row"]), fresh))
        kept, since = len(parts), time.monotonic()

    workers = thread_count(threads, index.is_remote)
    pool = ThreadPoolExecutor(workers)
    chunks = (rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK))
    try:
        for part in map_ordered(pool, lambda some: [_examine(index, row) for row in some], chunks, 4 * workers):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*part), SCAN_SCHEMA)]
            parts.append(pa.table([pa.array(rows[at : at + len(part)]), *columns], schema=found.schema))
            at += len(part)
            if time.monotonic() - since > KEPT_S:
                settle()
            if progress is not None:
                progress(len(index) - len(rows) + at, len(index))
    finally:
        pool.shutdown(cancel_futures=True)
        settle()
    return _beside(table, pa.concat_tables(parts).sort_by("row")), len(rows)


def _beside(table: pa.Table, found: pa.Table) -> pa.Table:
    """The rows of an index with what was found of each, and when its file was changed last."""
    columns = [*table.select(SCHEMA.names).columns, *found.select(SCAN_SCHEMA.names).columns, table[MODIFIED.name]]
    return pa.table(columns, schema=pa.schema([*SCHEMA, *SCAN_SCHEMA, MODIFIED])).combine_chunks()


def _remembered(table: pa.Table, known: Sequence[pa.Table]) -> tuple[pa.Table, np.ndarray]:
    """What is known of the images of `table`, with a column `row`; and the rows of which nothing is."""
    rows = pa.array(np.arange(table.num_rows))
    schema = pa.schema([("row", pa.int64()), *SCAN_SCHEMA])
    if not known:
        return schema.empty_table(), rows.to_numpy()
    before = pa.concat_tables([part.select([*SAME, *SCAN_SCHEMA.names]) for part in known])
    once = before.group_by(SAME, use_threads=False).aggregate([(name, "first") for name in SCAN_SCHEMA.names])
    once = once.rename_columns([name.removesuffix("_first") for name in once.column_names])
    joined = table.select(SAME).append_column("row", rows).join(once, SAME, join_type="inner")
    # What could not be read may be readable now.
    joined = joined.filter(pc.not_equal(joined["status"], "unreadable")).select(schema.names).cast(schema)
    return joined, np.setdiff1d(rows.to_numpy(), joined["row"].to_numpy())


def _modified(index: Index) -> np.ndarray:
    """When the file that holds each image was last changed, in nanoseconds; -1 for what is read from afar, or gone."""
    places = index.located_table()["container"].combine_chunks().dictionary_encode()
    places = places.combine_chunks() if isinstance(places, pa.ChunkedArray) else places
    times = np.array([_changed(place) for place in places.dictionary.to_pylist()], np.int64)
    return times[places.indices.to_numpy()] if len(times) else times


def _changed(container: str) -> int:
    path = container.rpartition(containers.COLUMN_SEPARATOR)[0] or container
    try:
        return -1 if files.REMOTE.match(container) else os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _examine(index: Index, row: int) -> tuple:
    """One row of SCAN_SCHEMA."""
    nothing = (None, None, None, None, None)
    try:
        data = index.read(row)
    except OSError as error:
        return ("unreadable", error.strerror or str(error), *nothing, None, None)
    sha256, header = hashlib.sha256(data).hexdigest(), nothing
    try:
        seen = read_header(data)
        header = (seen.format, seen.mode, seen.channels, seen.width, seen.height)
        pixels = decode(data, channels=None)
    except BadImage as bad:
        return (bad.status, bad.reason, *header, sha256, None)
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(pixels.data)
    return ("ok", None, *header, sha256, digest.hexdigest()[:32])


def _parts(folder: Path) -> list[pa.Table]:
    """What was found before a scan was stopped."""
    return [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]


def _keep(folder: Path, found: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(found, buffer, compression="zstd")
    number = len(list(folder.glob("*.parquet")))
    run.write_bytes(folder / f"{number:06d}.parquet", buffer.getvalue().to_pybytes())
