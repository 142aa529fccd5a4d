"""The scan of a dataset: reads and decodes every image once, and writes an index with the results.

That index is what later stages read. It has these columns in addition:

    status    "ok", the status of BadImage ("empty", "not an image", "truncated", "too large", "decode error"), or
              "unreadable" if the file itself could not be read
    reason    why it is not ok, in one line; else null
    format, mode, channels, width, height    of the upright image, from its header; null if there is none
    sha256    of the bytes, in hexadecimal: equal for byte-identical files; null if unreadable
    pixels    the first half of the sha256 of height, width, channels and decoded pixels: equal for images that look the
              same, however they were saved; null if not ok
    dtype, low, high    of images of more than 8 bits: their type, as "uint16", and the least and the greatest value;
              else null
    modified  when the file that holds the image was last changed, in nanoseconds; for a URL, a number made of its
              ETag or Last-Modified; -1 if unknown

Results are saved from time to time in a folder beside the index, so that an interrupted scan can resume. An image that
a finished index contains already, in a file that has not changed since, is not read again.
"""

import functools
import hashlib
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
from troodon.config import Range, UsageError, percentiles
from troodon.images import files
from troodon.images.decode import BadImage, as_bytes, decode_values, read_header
from troodon.images.index import MODIFIED, SCHEMA, UNKNOWN, Index, saved_range
from troodon.images.inventory import summarise
from troodon.images.reading import map_ordered
from troodon.images.sources import open_source
from troodon.images.values import measured
from troodon.lock import one_at_a_time
from troodon.pixels import used

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
        ("dtype", pa.string()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
IDENTITY = ["container", "offset", "length", "modified"]  # an image with equal values here has not changed
CHUNK = 32  # images per task: enough that the cost of submitting a task does not matter
SAVE_INTERVAL_S = 20

ProgressCallback = Callable[[int, int], None]


@one_at_a_time
def scan_to(
    paths: Sequence[str | Path],
    out: Path,
    threads: int,
    progress: ProgressCallback | None = None,
    range: Range | None = None,
) -> dict:
    """Scan these sources into the index artifact `out`, with a range of values, and return the summary.

    Percentiles as a range are measured, unless `out` has been made with them from the same files. An existing index of
    the same sources is updated. Raises UsageError if a source cannot be opened, or if `out` holds
    something else.
    """
    start = time.monotonic()
    index = open_source(*paths)
    shares = percentiles(range)
    index = index if shares else index.with_range(range)
    if index.datasets:
        raise UsageError(f"{next(iter(index.datasets))}: a file cannot list a Python dataset; pack it first")
    settings = {"sources": [str(p if files.REMOTE.match(str(p)) else Path(p).absolute()) for p in paths]}
    settings |= {"range": list(range or ())} if shares else {"range": list(index.range)} if index.range else {}
    modified = index.modification_times()
    fingerprint = config.fingerprint(settings, index.content_hash(), hashlib.sha256(modified.tobytes()).hexdigest())
    manifest = run.read_manifest(out)
    if manifest is None or manifest["kind"] != "index" or manifest["settings"] != settings:
        run.is_done(out, "index", fingerprint, settings)  # raises UsageError if `out` holds something else
    elif manifest["fingerprint"] == fingerprint and (modified != UNKNOWN).all():
        return run.read_json(out / "summary.json")
    parts = out.with_name(f"{out.name}.parts")
    if shares:
        index = index.with_range(measured(index, range, threads))
    previous = [_of_known_files(pq.read_table(out / "images.parquet"))] if manifest else []
    previous += [pq.read_table(path) for path in sorted(parts.glob("*.parquet"))]
    previous = [part for part in previous if saved_range(part.schema) == index.range]
    table, read = scan(index, threads, progress, modified, previous, functools.partial(_save_part, parts))
    with run.publish(out, "index", fingerprint, settings) as folder:
        Index(table).save(folder / "images.parquet")
        summary = summarise(table) | {"read": read, "seconds": round(time.monotonic() - start, 3)}
        run.write_json(folder / "summary.json", summary)
    shutil.rmtree(parts, ignore_errors=True)
    return summary


def scan(
    index: Index,
    threads: int,
    progress: ProgressCallback | None = None,
    modified: np.ndarray | None = None,
    previous: Sequence[pa.Table] = (),
    save: Callable[[pa.Table], None] | None = None,
) -> tuple[pa.Table, int]:
    """Read every image once; the index with the results, and the number of images read.

    `previous` are results of earlier scans: their images are not read again unless they have changed. `save` is called
    with new results every SAVE_INTERVAL_S seconds, and at the end, also after an error. `progress(done, total)` is
    called after each chunk.
    """
    modified = index.modification_times() if modified is None else modified
    table = index.located_table().append_column(MODIFIED, pa.array(modified))
    complete = [part for part in previous if set(part.column_names) >= {*IDENTITY, *SCAN_SCHEMA.names}]
    known, rows = _reuse(table, complete)
    parts = [known]
    done, saved, saved_at = 0, 1, time.monotonic()

    def save_new() -> None:
        nonlocal saved, saved_at
        if save is not None and saved < len(parts):
            parts[saved:] = [new := pa.concat_tables(parts[saved:]).combine_chunks()]
            save(_join(table.take(new["row"]), new))
        saved, saved_at = len(parts), time.monotonic()

    workers = index.thread_count(threads)
    pool = ThreadPoolExecutor(workers)
    chunks = (rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK))
    try:
        for part in map_ordered(pool, lambda chunk: [_examine(index, row) for row in chunk], chunks, 4 * workers):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*part), SCAN_SCHEMA)]
            parts.append(pa.table([pa.array(rows[done : done + len(part)]), *columns], schema=known.schema))
            done += len(part)
            if time.monotonic() - saved_at > SAVE_INTERVAL_S:
                save_new()
            if progress is not None:
                progress(len(index) - len(rows) + done, len(index))
    finally:
        pool.shutdown(cancel_futures=True)
        save_new()
    return _join(table, pa.concat_tables(parts).sort_by("row")), len(rows)


def _join(table: pa.Table, results: pa.Table) -> pa.Table:
    """The columns of an index, the results for the same rows, and the time when each file was changed."""
    columns = [*table.select(SCHEMA.names).columns, *results.select(SCAN_SCHEMA.names).columns, table[MODIFIED.name]]
    return pa.table(
        columns, schema=pa.schema([*SCHEMA, *SCAN_SCHEMA, MODIFIED], table.schema.metadata)
    ).combine_chunks()


def _reuse(table: pa.Table, previous: Sequence[pa.Table]) -> tuple[pa.Table, np.ndarray]:
    """Earlier results for the images of `table`, with a column `row`; and the rows that have none."""
    rows = pa.array(np.arange(table.num_rows))
    schema = pa.schema([("row", pa.int64()), *SCAN_SCHEMA])
    if not previous:
        return schema.empty_table(), rows.to_numpy()
    results = pa.concat_tables([part.select([*IDENTITY, *SCAN_SCHEMA.names]) for part in previous])
    unique = results.group_by(IDENTITY, use_threads=False).aggregate([(name, "first") for name in SCAN_SCHEMA.names])
    unique = unique.rename_columns([name.removesuffix("_first") for name in unique.column_names])
    joined = table.select(IDENTITY).append_column("row", rows).join(unique, IDENTITY, join_type="inner")
    # An image that could not be read then may be readable now.
    joined = joined.filter(pc.not_equal(joined["status"], "unreadable")).select(schema.names).cast(schema)
    return joined, np.setdiff1d(rows.to_numpy(), joined["row"].to_numpy())


def _of_known_files(table: pa.Table) -> pa.Table:
    """The rows of files of which it is known when they were changed."""
    return table.filter(pc.not_equal(table[MODIFIED.name], UNKNOWN)) if MODIFIED.name in table.column_names else table


def _examine(index: Index, row: int) -> tuple:
    """One row of SCAN_SCHEMA."""
    no_header, no_values = (None, None, None, None, None), (None, None, None)
    try:
        data = index.read(row)
    except OSError as error:
        return ("unreadable", error.strerror or str(error), *no_header, None, None, *no_values)
    sha256, header = hashlib.sha256(data).hexdigest(), no_header
    try:
        image = read_header(data)
        header = (image.format, image.mode, image.channels, image.width, image.height)
        values = decode_values(data, None, range=index.range)
        pixels = as_bytes(values, None, index.range)
    except BadImage as bad:
        return (bad.status, bad.reason, *header, sha256, None, *no_values)
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(pixels.data)
    return ("ok", None, *header, sha256, digest.hexdigest()[:32], *(used(values.array) or no_values)[:3])


def _save_part(folder: Path, results: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(results, buffer, compression="zstd")
    number = len(list(folder.glob("*.parquet")))
    run.write_bytes(folder / f"{number:06d}.parquet", buffer.getvalue().to_pybytes())
