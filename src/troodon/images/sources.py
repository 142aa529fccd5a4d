"""Sources of images, local or remote: a folder, a container, a list, an artifact of Troodon, or a Python dataset.

    folder      every image below it, and every tar, zip and Parquet file below it, as if it were a folder. Links are
                followed; hidden files, __MACOSX and embeddings.npy are skipped, and so are folders that Troodon has
                made or is making: results may lie among the images
    tar, zip    images are read in place; the .cls of a WebDataset sample is its label. `photos.tar/a/b` is the folder
                a/b in it; the last part may contain * and ?
    Parquet     a column of image bytes, the form of Hugging Face datasets; `x.parquet/photo` names the column. A row
                may have the path of a file instead
    list        .txt: a path or URL per line; .csv, .tsv, .jsonl and Parquet: a column `path`, `url` ..., optionally
                `label` and `split`. Paths are relative to the list
    volume      NIfTI, and DICOM of several frames, in a folder: each slice is an image, `brain.nii.gz#012` (volumes.py)
    artifact    an index or embeddings: the rows that could be read; a selection: the rows that it kept; and what a
                person decided about these (decisions.py). It is refused if its files have changed (changes.py)
    dataset     a Python object with len() and [row], whose items are or contain an image

An image is what has the extension of one, and any other local file or member that begins like one. A message says, by
extension or reason, how many files are left out.

All but the last may be URLs (https://, s3://, gs:// ...: see files.py). Masks and depth maps have the names of images:
to exclude them, give the folder beside them (`camvid.tar/images`).

A `path` starts with the name of its source (`photos/cats/1.jpg`, `shards.tar/a/2.png`). If two sources share a name, it
starts with as many folders above them as distinguish them. Labels and splits: see labels.py.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import changes, containers, files, listing
from troodon.images.decisions import FILE, followed
from troodon.images.entries import Listing
from troodon.images.formats import IMAGE_EXTENSIONS, LIST_EXTENSIONS, extension, extensions_hint, is_hidden
from troodon.images.index import SCHEMA, Index, join_path, saved_range, usable_rows
from troodon.images.labels import assign_labels
from troodon.images.members import dataset_labels
from troodon.text import plural


@dataclass(frozen=True)
class Place:
    """A path that a user gives: a file or folder that exists, and the rest of the path, which is inside it."""

    root: str
    inside: str = ""

    @property
    def kind(self) -> str | None:
        """ "tar", "zip", "parquet", "list", "file", or None for a folder."""
        name, is_remote = self.root.rpartition("/")[2], files.REMOTE.match(self.root)
        if not is_remote and os.path.isdir(self.root):
            return None
        if extension(name) in LIST_EXTENSIONS:
            return "list"
        return containers.kind(name) or ("file" if not is_remote or extension(name) in IMAGE_EXTENSIONS else None)


def open_source(*places: Any) -> Index:
    """The index of all images of these sources, in this order; within a source, by path. Each image is listed once.

    A source is a path, a URL, or a Python dataset. Raises UsageError for one that does not exist, cannot be read or has
    no images.
    """
    if not places:
        raise UsageError("no images given: name a folder, a tar, an image file or an index")
    files.forget_versions()
    located = [_locate(str(place)) if isinstance(place, str | Path) else place for place in places]
    named = list(dict.fromkeys(place for place in located if isinstance(place, Place)))
    names = _names([place.root for place in named])
    opened = {place: _open(place, names[place.root]) for place in named}
    parts = [opened.pop(p, None) if isinstance(p, Place) else _open_dataset(p) for p in located]  # each once
    index = Index.concat([part for part in parts if part is not None])
    return index if len(parts) == 1 else _without_repeats(index)


def _without_repeats(index: Index) -> Index:
    """The same images, each at its first place."""
    locations = zip(index.column("container"), index.column("offset"))
    first = {location: row for row, location in reversed(list(enumerate(locations)))}
    if len(first) == len(index):
        return index
    rows, start, lengths = sorted(first.values()), 0, []
    for length in index.source_lengths:
        lengths.append(sum(start <= row < start + length for row in rows))
        start += length
    return replace(index.take(rows), source_lengths=tuple(lengths))


def _locate(path: str) -> Place:
    """Split a path into the folder or file that exists, and the rest, which is inside it."""
    if files.REMOTE.match(path):
        parts = path.rstrip("/").split("/")
        can_hold = [bool(containers.kind(part)) or extension(part) in LIST_EXTENSIONS for part in parts]
        end = next((i + 1 for i in range(3, len(parts)) if can_hold[i]), len(parts))
        return Place("/".join(parts[:end]), "/".join(parts[end:]))
    try:
        path.encode()
    except UnicodeEncodeError:  # neither an index nor a message could hold it
        raise UsageError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename it") from None
    full = Path(os.path.abspath(os.path.expanduser(path)))
    root = next(p for p in (full, *full.parents) if os.path.exists(p))
    inside = full.relative_to(root).as_posix() if root != full else ""
    if inside and root.is_dir():
        missing = inside.split("/")[0]
        raise UsageError(f"{path}: there is no {missing!r} in {root}{listing.suggest(missing, _entries(root))}")
    if inside and not containers.kind(root.name):
        raise UsageError(f"{path}: {root.name} is a file, not a folder, tar, zip or Parquet: nothing is inside it")
    return Place(str(root), inside)


def _names(roots: Iterable[str]) -> dict[str, str]:
    """The start of the paths of each source: as few of its last parts as distinguish all sources."""
    roots = list(dict.fromkeys(roots))
    parts_of = {root: [part for part in root.split("/") if part] for root in roots}
    names: dict[str, str] = {}
    for count in range(1, max(map(len, parts_of.values()), default=0) + 1):
        names = {root: "/".join(parts[-count:]) for root, parts in parts_of.items()}
        if len(set(names.values())) == len(roots):
            break
    return names


def _open_artifact(root: str) -> Index | None:
    """The index of the images that an artifact of Troodon lists; None for anything else."""
    if (manifest := listing.read_manifest(root)) is None:
        return None
    kind, fingerprint = manifest["kind"], manifest["fingerprint"]
    images = join_path(root, "images.parquet")
    if kind not in ("index", "embeddings", "selection") or not files.exists(images):
        raise UsageError(f"{root}: is {run.article(kind)}, which lists no images: give a folder, a tar, an index ...")
    mapped = Path(root, "images.arrow")
    if mapped.exists() and not Path(root, FILE).exists():
        changes.check_mapped(root)
        return Index.open_mapped(mapped, root, fingerprint)
    with files.open_file(images) as file:
        table = usable_rows(followed(pq.read_table(file), Path(root)))
    if not table.num_rows:
        raise UsageError(f"{root}: this {kind} has no usable image")
    changes.check_opened(root, table)
    index = Index(table.select(SCHEMA.names), base=root, range=saved_range(table.schema))
    return replace(index, table=index.located_table(), base="")


def _open(place: Place, name: str) -> Index:
    """The index of one source, its rows sorted by path."""
    root, kind = place.root, place.kind
    if kind is None and (artifact := _open_artifact(root)) is not None:
        return artifact
    entries, prefix = Listing(), f"{name}/" if kind != "file" else ""
    try:
        if kind is None:
            listing.list_folder(root, prefix, entries)
        elif kind == "list":
            listing.list_text_file(_real_path(root), prefix, entries)
        elif kind == "file":
            listing.list_file(_real_path(root), name, entries)
        else:
            listing.list_container(_real_path(root), prefix, place.inside, entries)
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise UsageError(f"{root}: cannot be read ({reason[:300]})") from None
    _check(f"{root}/{place.inside}" if place.inside else root, entries)
    order = sorted(range(len(entries.paths)), key=entries.paths.__getitem__)
    paths = [entries.paths[i] for i in order]
    location = [[column[i] for i in order] for column in (entries.containers, entries.offsets, entries.lengths)]
    return Index(pa.table([paths, *location, *assign_labels(paths, prefix, entries.tables, run.say)], schema=SCHEMA))


def _open_dataset(dataset: Any) -> Index:
    """The index of an object with len() and [row], named by its `_fingerprint` or its class."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UsageError(f"data {dataset!r:.80}: neither a path nor a dataset with len() and [row]")
    if not len(dataset):
        raise UsageError(f"{type(dataset).__name__}: this dataset is empty")
    name = str(getattr(dataset, "_fingerprint", None) or type(dataset).__qualname__)
    paths = [f"{type(dataset).__name__}/{row:0{len(str(len(dataset)))}d}" for row in range(len(dataset))]
    labels = dataset_labels(dataset) or [None] * len(dataset)
    key, rows = f"object:{name}", list(range(len(dataset)))
    table = pa.table([paths, [key] * len(rows), rows, [-1] * len(rows), labels, [None] * len(rows)], schema=SCHEMA)
    return Index(table, datasets={key: dataset})


def _check(source: str, entries: Listing) -> None:
    """Raise UsageError if there is no image; print a message about files that are not read."""
    endings, reasons = entries.left_out.endings_text(), entries.left_out.reasons_text()
    if entries.paths:
        if endings or reasons:
            text = f" {endings}; {reasons}" if endings and reasons else f" {endings}" if endings else f": {reasons}"
            run.say(f"{source}: leaves out{text}")
        return
    if not (endings or reasons):
        raise UsageError(f"{source}: is empty; {extensions_hint()}")
    among = f" among {plural(entries.left_out.endings.total(), 'file')} ({endings}); " if endings else ": "
    raise UsageError(f"{source}: no images{among}{reasons or extensions_hint()}")


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not is_hidden(name)]


def _real_path(path: str) -> str:
    """The absolute path without linked folders; the last part stays, since its extension gives the type."""
    if files.REMOTE.match(path):
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
