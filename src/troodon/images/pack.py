"""Images into tar shards with an index: few large files in place of many small or distant ones.

    00000.tar ...     the images, in the order of the index; samples of WebDataset, with their class if there is one
                      (.cls where it is a number, .txt where it is a word)
    images.parquet    the index: what people call each image, and where its bytes lie now; `sha256` is of these bytes
    left_out.json     images that could not be read or, where pixels were needed, decoded: path, status, reason

Bytes are copied as they are. With `side`, pictures whose shorter side is longer are made smaller, and saved again in
the kind of format that they came in: JPEG, or PNG where nothing was lost before. With `encode`, all are saved so.
Every shard is read again and compared before it counts as written, and is an artifact of its own until all are there:
a run that was killed goes on with the next.
"""

import contextlib
import functools
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from troodon import run
from troodon.config import UsageError, fingerprint
from troodon.images.config import PackConfig
from troodon.images.decode import BadImage, decode, read_header
from troodon.images.index import SCHEMA, Index
from troodon.images.listing import IMAGE_EXTENSIONS
from troodon.images.reading import map_ordered, thread_count
from troodon.images.scan import ProgressCallback

SAMPLED = 64  # images from which the size of all is told
MARGIN = 2  # a JPEG is decoded no smaller than this many times what it is resized to
LOSSLESS = frozenset(("PNG", "BMP", "TIFF", "GIF", "PPM", "DIB", "QOI", "TGA", "ICO", "ICNS", "PSD", "PCX", "SGI"))
ENDING = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # of formats whose names end otherwise than they are called


class Item(NamedTuple):
    """An image on its way: its row, its bytes; or why there are none."""

    row: int
    data: bytes
    bad: tuple[str, str] | None  # status and reason


def pack(index: Index, out: Path, config: PackConfig, threads: int, progress: ProgressCallback | None = None) -> dict:
    """Publish the images of an index as an index artifact with its own shards in `out`, unless it is there; a summary.

    UsageError where `out` holds something else, or the disk has no room.
    """
    settings = asdict(config) | {"images": len(index), "contents": index.content_hash()[:12]}
    name = fingerprint(settings, index.content_hash())
    if run.is_done(out, "index", name, settings):
        return run.read_json(out / "summary.json")
    workers = thread_count(threads, index.is_remote)
    home = out.with_name(f"{out.name}.parts")
    with ThreadPoolExecutor(workers) as pool:
        take = functools.partial(_taken, index, config)
        per_shard = _plan(index, out, config, pool.map(take, _spread(len(index))))
        shards: list[Path] = []
        for number, start in enumerate(range(0, len(index), per_shard)):
            rows = range(start, min(start + per_shard, len(index)))
            shards.append(folder := home / f"{number:05d}")
            of = {"whole": name, "first": start, "images": len(rows)}
            if not run.is_done(folder, "shard", fingerprint(of), of):
                told = (lambda at, start=start: progress(start + at, len(index))) if progress else None
                with run.publish(folder, "shard", fingerprint(of), of) as partial:
                    items = map_ordered(pool, take, rows, 4 * workers)
                    _write(index, items, partial, f"{number:05d}.tar", told)
    with run.publish(out, "index", name, settings) as partial:
        summary = _join(shards, partial)
        assert summary["images"] + summary["left_out"] == len(index), summary
        run.write_json(partial / "summary.json", summary)
    shutil.rmtree(home, ignore_errors=True)
    return summary


def _plan(index: Index, out: Path, config: PackConfig, sample: Iterable[Item]) -> int:
    """How many images make a shard. UsageError where the disk has no room for all."""
    sizes = [len(item.data) + 1024 for item in sample if item.bad is None]  # with a header, rounded up
    if not sizes:
        raise UsageError(f"none of {min(SAMPLED, len(index))} images looked at can be read")
    mean = sum(sizes) / len(sizes)
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    done = sum(file.stat().st_size for file in out.with_name(f"{out.name}.parts").rglob("*.tar"))
    needed, free = mean * len(index) - done, shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(f"{out}: needs about {needed / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left")
    return max(1, round(config.shard_mb * 1e6 / mean))


def _spread(images: int) -> list[int]:
    return sorted({round(i * (images - 1) / max(1, SAMPLED - 1)) for i in range(SAMPLED)})


def _taken(index: Index, config: PackConfig, row: int) -> Item:
    """The bytes of an image as they go into the shard."""
    try:
        data = index.read(row)
        return Item(row, _saved(data, config), None)
    except BadImage as bad:
        return Item(row, b"", (bad.status, bad.reason))
    except OSError as error:
        return Item(row, b"", ("unreadable", error.strerror or str(error)))


def _saved(data: bytes, config: PackConfig) -> bytes:
    """The same picture, smaller or in another format, if it has to be. Raises BadImage."""
    if not config.side and config.encode == "as-is":
        return data
    seen = read_header(data)
    shrinks = 0 < config.side < min(seen.width, seen.height)
    if not shrinks and config.encode == "as-is":
        return data

    def shrink(height: int, width: int) -> int:
        return next((times for times in (8, 4, 2) if min(height, width) >= times * MARGIN * config.side), 1)

    pixels_HWC = decode(data, None, shrink if shrinks else None)
    if shrinks:
        share = config.side / min(seen.width, seen.height)
        size = (max(1, round(seen.width * share)), max(1, round(seen.height * share)))
        pixels_HWC = np.stack([_resized(pixels_HWC[:, :, c], size) for c in range(pixels_HWC.shape[2])], axis=2)
    out = io.BytesIO()
    if seen.format == "NPY":
        np.save(out, pixels_HWC, allow_pickle=False)
        return out.getvalue()
    grey = seen.channels == 1 and bool((pixels_HWC == pixels_HWC[:, :, :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels_HWC[:, :, 0]) if grey else pixels_HWC)
    kind = "png" if seen.format in LOSSLESS else "jpeg"
    format = kind if config.encode == "as-is" else config.encode
    picture.save(out, format, quality=config.quality)
    return out.getvalue()


def _resized(channel_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(channel_HW).resize(size, Image.Resampling.BICUBIC))


def _write(
    index: Index, items: Iterable[Item], folder: Path, container: str, told: Callable[[int], None] | None
) -> None:
    """One shard: its tar, its part of the index, what was left out; read again and compared."""
    offsets, lengths, hashes, kept, left = [], [], [], [], []
    names: set[str] = set()
    with open(folder / "shard.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for at, item in enumerate(items, 1):
            if item.bad is not None:
                left.append({"path": index.path(item.row), "status": item.bad[0], "reason": item.bad[1]})
            else:
                name = _name(index.path(item.row), item, names)
                offsets.append(_add(tar, file, name, item.data))
                _add_label(tar, file, name, index.table["label"][item.row].as_py())
                lengths.append(len(item.data))
                hashes.append(hashlib.sha256(item.data).hexdigest())
                kept.append(item.row)
            if told is not None:
                told(at)
    with open(folder / "shard.tar", "rb") as file:
        os.fsync(file.fileno())
    table = index.take(kept).located_table()
    columns = {
        "container": pa.array([container] * len(kept), pa.string()),
        "offset": pa.array(offsets, pa.int64()),
        "length": pa.array(lengths, pa.int64()),
    }
    for column, values in columns.items():
        table = table.set_column(SCHEMA.get_field_index(column), column, values)
    _verify(folder / "shard.tar", table["path"].to_pylist(), offsets, lengths, hashes)
    pq.write_table(table.append_column("sha256", pa.array(hashes, pa.string())), folder / "images.parquet")
    run.write_json(folder / "left_out.json", left)


def _name(path: str, item: Item, taken: set[str]) -> str:
    """What an image is called in its tar: as people call it, with the ending of what it is, and no other dot after the
    last slash: samples of WebDataset are told apart by what stands before the first."""
    *folders, last = path.split("/")
    stem, dot, ending = last.rpartition(".")
    if not dot or ending.lower() not in IMAGE_EXTENSIONS:
        stem, ending = last, "bin"
    with contextlib.suppress(BadImage):
        format = read_header(item.data).format
        ending = ENDING.get(format, format.lower())
    folders = [part for part in folders if part not in ("", ".", "..")]
    key = "/".join([*folders, stem.replace(".", "_")])
    if key in taken:
        key += f"_{item.row}"
    taken.add(key)
    return f"{key}.{ending}"


def _add(tar: tarfile.TarFile, file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file to the tar; where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
    return file.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add_label(tar: tarfile.TarFile, file: IO[bytes], name: str, label: str | None) -> None:
    if label is not None:
        _add(tar, file, f"{name.rpartition('.')[0]}.{'cls' if label.isdecimal() else 'txt'}", label.encode())


def _verify(tar: Path, paths: list[str], offsets: list[int], lengths: list[int], hashes: list[str]) -> None:
    with open(tar, "rb") as file:
        for path, offset, length, sha256 in zip(paths, offsets, lengths, hashes):
            if hashlib.sha256(os.pread(file.fileno(), length, offset)).hexdigest() != sha256:
                raise OSError(f"{tar}: {path} was not written as it was; is the disk sound?")


def _join(shards: list[Path], folder: Path) -> dict:
    """All shards side by side, under one index; the summary."""
    left = [entry for shard in shards for entry in run.read_json(shard / "left_out.json")]
    for shard in shards:
        try:
            os.link(shard / "shard.tar", folder / f"{shard.name}.tar")
        except OSError:  # a file system without links
            shutil.move(shard / "shard.tar", folder / f"{shard.name}.tar")
    table = pa.concat_tables([pq.read_table(shard / "images.parquet") for shard in shards])
    Index(table).save(folder / "images.parquet")
    run.write_json(folder / "left_out.json", left)
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    return {"images": len(table), "left_out": len(left), "shards": len(shards), "bytes": size}
