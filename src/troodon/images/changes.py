"""What has changed on the disk since an artifact was made.

Artifacts know the files of their images by the time of their last change (column `modified`; of a URL, a number made of
its ETag or Last-Modified), packed shards by hashes of the images in them, and others by lengths. Files are checked when
an artifact is opened or would be used again: one call of stat for each, or for a sample where there are many.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files
from troodon.images.index import MODIFIED, UNKNOWN, Index, join_path, usable_rows

MAX_CHECKED = 4096  # files of an artifact that are compared with the disk when it is opened; of more, a sample
MAX_REMOTE_CHECKED = 64
MAX_HASHED = 64  # images of packed shards


def file_states(index: Index) -> dict[str, str]:
    """The length and the time of change of each file, in words, by container as listed, sorted; "gone" if unknown."""
    names = sorted(set(index.column("container")))
    return dict(zip(names, containers.map_files(_state, [index.located(name) for name in names])))


def _state(container: str) -> str:
    path = containers.file_of(container)
    if files.REMOTE.match(path):
        return "gone" if (time := files.modified(path)) == UNKNOWN else str(time)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "gone"
    return f"{status.st_size}\0{status.st_mtime_ns}"


def times_fingerprint(times_N: np.ndarray) -> str:
    """A fingerprint of what Index.modification_times gives."""
    return hashlib.sha256(times_N.tobytes()).hexdigest()[:16]


def refuse_changed(out: Path, index: Index) -> None:
    """Raise UsageError if the finished artifact `out` was made from files of `index` that have changed since."""
    if (changed := index.first_changed(out / "images.parquet")) is not None:
        raise other_files(out, changed)


def other_files(out: Path, changed: str) -> UsageError:
    return UsageError(f"{out}: was made from {changed}, which has changed since; choose a new --out, or remove it")


def check_opened(root: str, table: pa.Table) -> None:
    """Raise UsageError if files have changed that the artifact `root` lists, or its containers no longer exist.

    `table` has the rows that can be used, with containers as listed.
    """
    unique = pc.unique(table["container"])
    sample = _sample(unique.to_pylist(), MAX_CHECKED)
    if len(sample) < len(unique):
        run.say(f"{root}: lists {len(unique):,} files; {len(sample):,} of them are checked for changes")
    remote = _sample([name for name in sample if files.REMOTE.match(name)], MAX_REMOTE_CHECKED)
    local = [] if files.REMOTE.match(root) else [name for name in sample if not files.REMOTE.match(name)]
    for name in [name for name in local if containers.kind(containers.file_of(name))] or local[:1]:
        if not os.path.exists(path := join_path(root, containers.file_of(name))):
            raise UsageError(f"{root}: lists images in {path}, which no longer exists")
    if local and not os.path.isabs(local[0]):
        return _check_packed(root, table)
    if MODIFIED.name in table.column_names:
        rows = pc.index_in(pa.array(local + remote, pa.string()), table["container"].combine_chunks())
        before, now = table[MODIFIED.name].take(rows).to_pylist(), containers.modified(local + remote)
        unknown = (None, UNKNOWN)
        pairs = [(name, *times) for name, *times in zip(local + remote, before, now) if not {*times} & {*unknown}]
        changed = next((name for name, was, is_now in pairs if was != is_now), None)
    else:
        changed = _first_of_other_size(local, table)
    if changed is not None:
        raise UsageError(f"{containers.file_of(changed)}: changed since the index was made; scan again ({root})")


def check_mapped(root: str) -> None:
    """The same as `check_opened` for an artifact of very many images: for some at its start, middle and end."""
    wanted = ("container", "offset", "length", "sha256", "status", "kept", MODIFIED.name)
    with pq.ParquetFile(Path(root, "images.parquet")) as file:
        columns, last = [name for name in wanted if name in file.schema_arrow.names], file.num_row_groups - 1
        parts = [
            pa.Table.from_batches([next(file.iter_batches(MAX_CHECKED, [group], columns))])
            for group in sorted({0, last // 2, last})
        ]
    run.say(f"{root}: some of its files are checked for changes")
    if len(table := usable_rows(pa.concat_tables(parts))):
        check_opened(root, table)


def _check_packed(root: str, table: pa.Table) -> None:
    """Compare images in packed shards with their hashes: a few from each shard, since a copied shard has a new time."""
    if "sha256" not in table.column_names:
        return
    index = Index(table, base=root)
    names = table["container"].combine_chunks()
    shards = _sample(pc.unique(names).to_pylist(), MAX_HASHED // 2)
    for name in shards:
        rows = np.flatnonzero(pc.equal(names, name).to_numpy(zero_copy_only=False))
        for row in _sample(rows.tolist(), max(2, MAX_HASHED // len(shards))):
            expected = table["sha256"][row].as_py()
            try:
                is_same = hashlib.sha256(index.read(row)).hexdigest() == expected
            except OSError:
                is_same = False
            if expected is not None and not is_same:
                raise UsageError(f"{join_path(root, name)}: changed since the index was made; pack again ({root})")


def _first_of_other_size(names: list[str], table: pa.Table) -> str | None:
    """The first local file that is too short for what is listed in it or, if it is an image, of another length."""
    places = pa.table([table["container"], pc.add(table["offset"], table["length"])], names=["name", "end"])
    ends = places.group_by("name").aggregate([("end", "max")])
    end_of = dict(zip(ends["name"].to_pylist(), ends["end_max"].to_pylist()))
    for name in names:
        path = containers.file_of(name)
        if path == name and os.path.exists(path):  # rows of Parquet have no length
            size, end = os.path.getsize(path), end_of[name]
            if size < end if containers.kind(path) else end not in (-1, size):
                return name
    return None


def _sample(values: list, count: int) -> list:
    """At most `count` of these, evenly, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[i * (len(values) - 1) // (count - 1)] for i in range(count)]
