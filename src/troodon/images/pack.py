"""Write images into tar shards with an index: a few large files instead of many small or remote ones.

    00000.tar ...     the images, in the order of the index, as WebDataset samples, with their class if there is one
                      (.cls for a number, .txt for a word)
    images.parquet    the index: the name of each image, and where its bytes are now; `sha256` is of these bytes
    left_out.json     images that could not be read or, if pixels were needed, decoded: path, status, reason

Bytes are copied unchanged. With `side`, images whose shorter side is longer are resized and encoded again: as PNG if
their format is lossless, else as JPEG. With `encode`, all images are encoded in that format. Every shard is read back
and compared before it counts as written, and is an artifact of its own until all shards exist: a run that was killed
continues with the next shard.
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
from troodon.config import Range, UsageError, fingerprint
from troodon.images.changes import other_files, times_fingerprint
from troodon.images.config import PackConfig
from troodon.images.decode import NPY_MAGIC, BadImage, decode, read_header
from troodon.images.index import SCHEMA, Index
from troodon.images.listing import IMAGE_EXTENSIONS
from troodon.images.reading import map_ordered
from troodon.images.scan import ProgressCallback
from troodon.lock import one_at_a_time
from troodon.text import plural, with_prefix

SAMPLE_SIZE = 64  # images from which the size of all is estimated
MARGIN = 2  # a JPEG is decoded at no less than this many times the size that it is resized to
# fmt: off
LOSSLESS = frozenset((
    "PNG", "BMP", "TIFF", "GIF", "PPM", "DIB", "QOI", "TGA", "ICO", "ICNS", "PSD", "PCX", "SGI", "DICOM", "NIfTI",
))
# fmt: on
EXTENSION = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "DICOM": "dcm"}  # where it is not the format's name


class Encoded(NamedTuple):
    """The bytes of an image for the shard; or why there are none."""

    row: int
    data: bytes
    error: tuple[str, str] | None  # status and reason


@one_at_a_time
def pack(index: Index, out: Path, config: PackConfig, threads: int, progress: ProgressCallback | None = None) -> dict:
    """Publish the images of an index in `out` as an index artifact with its own shards, unless done; the summary.

    Raises UsageError if `out` holds something else, or the disk is too full.
    """
    settings = asdict(config) | {"images": len(index), "contents": index.content_hash()[:12]}
    identity, modified = fingerprint(settings, index.content_hash()), index.modification_times()
    times = times_fingerprint(modified)
    if run.is_done(out, "index", identity, settings):
        summary = run.read_json(out / "summary.json")
        if summary.get("sources", times) != times:
            newest = int(modified.argmax())
            is_newer = modified[newest] > (out / run.MANIFEST).stat().st_mtime_ns
            raise other_files(out, index.file(newest) if is_newer else "images, one of")
        return summary
    workers = index.thread_count(threads)
    parts = out.with_name(f"{out.name}.parts")
    with ThreadPoolExecutor(workers) as pool:
        encode = functools.partial(_encode, index, config)
        per_shard = _plan(index, out, config, pool.map(encode, _sample_rows(len(index))))
        shards: list[Path] = []
        for number, start in enumerate(range(0, len(index), per_shard)):
            rows = range(start, min(start + per_shard, len(index)))
            shards.append(folder := parts / f"{number:05d}")
            shard = {"whole": identity, "first": start, "images": len(rows), "sources": times}
            if ((run.read_manifest(folder) or {}).get("settings") or shard).get("sources") != times:
                shutil.rmtree(folder)  # of an unfinished pack of other files
            if not run.is_done(folder, "shard", fingerprint(shard), shard):
                report = (lambda done, start=start: progress(start + done, len(index))) if progress else None
                with run.publish(folder, "shard", fingerprint(shard), shard) as partial:
                    images = map_ordered(pool, encode, rows, 4 * workers)
                    _write_shard(index, images, partial, f"{number:05d}.tar", report)
    with run.publish(out, "index", identity, settings) as partial:
        summary = _join(shards, partial)
        assert summary["images"] + summary["left_out"] == len(index), summary
        run.write_json(partial / "summary.json", summary | {"sources": times})
    shutil.rmtree(parts, ignore_errors=True)
    return summary


def _plan(index: Index, out: Path, config: PackConfig, sample: Iterable[Encoded]) -> int:
    """The number of images per shard. Raises UsageError if the disk has too little space."""
    images = [image.data for image in sample if image.error is None]
    sizes = [len(data) + 1024 for data in images]  # with a tar header, rounded up
    count = f"none of {plural(min(SAMPLE_SIZE, len(index)), 'sampled image')}"
    if not sizes:
        raise UsageError(f"{count} can be read")
    if not any(map(_has_header, images)):
        run.say(f"pack: {count} begins like an image that can be decoded; `troodon scan` says what they are")
    mean = sum(sizes) / len(sizes)
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    done = sum(file.stat().st_size for file in out.with_name(f"{out.name}.parts").rglob("*.tar"))
    needed, free = mean * len(index) - done, shutil.disk_usage(existing).free
    if needed > free:
        raise UsageError(f"{out}: needs about {with_prefix(needed)}B, and the disk has {with_prefix(free)}B free")
    return max(1, round(config.shard_mb * 1e6 / mean))


def _has_header(data: bytes) -> bool:
    with contextlib.suppress(BadImage):
        return bool(read_header(data))
    return False


def _sample_rows(images: int) -> list[int]:
    return sorted({round(i * (images - 1) / max(1, SAMPLE_SIZE - 1)) for i in range(SAMPLE_SIZE)})


def _encode(index: Index, config: PackConfig, row: int) -> Encoded:
    """Read an image, and encode it as the settings say."""
    try:
        data = index.read(row)
        return Encoded(row, _reencode(data, config, index.range), None)
    except BadImage as bad:
        return Encoded(row, b"", (bad.status, bad.reason))
    except OSError as error:
        return Encoded(row, b"", ("unreadable", error.strerror or str(error)))


def _reencode(data: bytes, config: PackConfig, range: Range | None) -> bytes:
    """The same image, resized or in another format if the settings need it. Raises BadImage."""
    if not config.side and config.encode == "as-is":
        return data
    header = read_header(data)
    is_resized = 0 < config.side < min(header.width, header.height)
    if not is_resized and config.encode == "as-is":
        return data

    def choose_reduction(height: int, width: int) -> int:
        return next((factor for factor in (8, 4, 2) if min(height, width) >= factor * MARGIN * config.side), 1)

    pixels_HWC = decode(data, None, choose_reduction if is_resized else None, range)
    if is_resized:
        scale = config.side / min(header.width, header.height)
        size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
        pixels_HWC = np.stack([_resize(pixels_HWC[:, :, c], size) for c in np.arange(pixels_HWC.shape[2])], axis=2)
    out = io.BytesIO()
    if header.format == "NPY":
        np.save(out, pixels_HWC, allow_pickle=False)
        return out.getvalue()
    is_grey = header.channels == 1 and bool((pixels_HWC == pixels_HWC[:, :, :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels_HWC[:, :, 0]) if is_grey else pixels_HWC)
    kind = "png" if header.format in LOSSLESS else "jpeg"
    format = kind if config.encode == "as-is" else config.encode
    picture.save(out, format, quality=config.quality)
    return out.getvalue()


def _resize(channel_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(channel_HW).resize(size, Image.Resampling.BICUBIC))


def _write_shard(
    index: Index, images: Iterable[Encoded], folder: Path, container: str, progress: Callable[[int], None] | None
) -> None:
    """Write one shard: its tar, its part of the index and its skipped images; then read it back and compare."""
    offsets, lengths, hashes, rows, skipped = [], [], [], [], []
    names: set[str] = set()
    with open(folder / "shard.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for done, image in enumerate(images, 1):
            if image.error is not None:
                status, reason = image.error
                skipped.append({"path": index.path(image.row), "status": status, "reason": reason})
            else:
                name = _member_name(index.path(image.row), image, names)
                offsets.append(_add(tar, file, name, image.data))
                _add_class(tar, file, name, index.table["label"][image.row].as_py())
                lengths.append(len(image.data))
                hashes.append(hashlib.sha256(image.data).hexdigest())
                rows.append(image.row)
            if progress is not None:
                progress(done)
    with open(folder / "shard.tar", "rb") as file:
        os.fsync(file.fileno())
    table = index.take(rows).located_table()
    columns = {
        "container": pa.array([container] * len(rows), pa.string()),
        "offset": pa.array(offsets, pa.int64()),
        "length": pa.array(lengths, pa.int64()),
    }
    for column, values in columns.items():
        table = table.set_column(SCHEMA.get_field_index(column), column, values)
    _verify(folder / "shard.tar", table["path"].to_pylist(), offsets, lengths, hashes)
    pq.write_table(table.append_column("sha256", pa.array(hashes, pa.string())), folder / "images.parquet")
    run.write_json(folder / "left_out.json", skipped)


def _member_name(path: str, image: Encoded, used: set[str]) -> str:
    """The name of an image in its tar: its path, with the extension of its format and no other dot after the last
    slash, since the key of a WebDataset sample ends at the first dot."""
    *folders, last = path.split("/")
    stem, dot, extension = last.rpartition(".")
    if not dot or extension.lower() not in IMAGE_EXTENSIONS:
        stem, extension = last, "bin"
    with contextlib.suppress(BadImage):
        format = read_header(image.data).format
        extension = "npy" if image.data.startswith(NPY_MAGIC) else EXTENSION.get(format, format.lower())
    folders = [part for part in folders if part not in ("", ".", "..")]
    key = "/".join([*folders, stem.replace(".", "_")])
    if key in used:
        key += f"_{image.row}"
    used.add(key)
    return f"{key}.{extension}"


def _add(tar: tarfile.TarFile, file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file to the tar; the offset of its bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
    return file.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add_class(tar: tarfile.TarFile, file: IO[bytes], name: str, label: str | None) -> None:
    if label is not None:
        _add(tar, file, f"{name.rpartition('.')[0]}.{'cls' if label.isdecimal() else 'txt'}", label.encode())


def _verify(tar: Path, paths: list[str], offsets: list[int], lengths: list[int], hashes: list[str]) -> None:
    with open(tar, "rb") as file:
        for path, offset, length, sha256 in zip(paths, offsets, lengths, hashes):
            if hashlib.sha256(os.pread(file.fileno(), length, offset)).hexdigest() != sha256:
                raise OSError(f"{tar}: {path} was not written correctly; check the disk")


def _join(shards: list[Path], folder: Path) -> dict:
    """Put all shards into one folder with one index; the summary."""
    skipped = [entry for shard in shards for entry in run.read_json(shard / "left_out.json")]
    for shard in shards:
        try:
            os.link(shard / "shard.tar", folder / f"{shard.name}.tar")
        except OSError:  # a file system without links
            shutil.move(shard / "shard.tar", folder / f"{shard.name}.tar")
    table = pa.concat_tables([pq.read_table(shard / "images.parquet") for shard in shards])
    Index(table).save(folder / "images.parquet")
    run.write_json(folder / "left_out.json", skipped)
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    return {"images": len(table), "left_out": len(skipped), "shards": len(shards), "bytes": size}
