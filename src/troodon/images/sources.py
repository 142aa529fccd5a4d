"""Where images lie, here or elsewhere: a folder, a file that holds many, a list of them, an artifact, a data set.

What one finds:

    folder      every file below it whose name ends as images do, and every tar, zip and Parquet file below it as if it
                were a folder. Links are followed; hidden files, __MACOSX and embeddings.npy are left out
    tar, zip    images are read where they lie; a sample's .cls (WebDataset) is its label. `photos.tar/a/b` is the
                folder a/b in it, whose last part may hold * and ?
    Parquet     a column of image bytes, as Hugging Face's datasets are stored; `x.parquet/photo` names the column
    list        .txt, a path or URL a line; .csv, .tsv and Parquet: a column `path`, `url` ..., and perhaps `label` and
                `split`. Paths are relative to the list
    artifact    an index or embeddings: the rows that could be read; a selection: the rows it kept
    data set    an object of Python's with len() and [row], whose items are or hold a picture

All but the last may be URLs (https://, s3://, gs:// ...: see files.py). Masks and depth maps are images by their names:
give the folder beside them (`camvid.tar/images`) to leave them out.

A `path` starts with the name of its source (`photos/cats/1.jpg`, `shards.tar/a/2.png`); where two sources share a
name, with as much of what lies above them as tells them apart. Labels and splits: see labels.py.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files, listing
from troodon.images.index import SCHEMA, Index, join, usable
from troodon.images.labels import assign
from troodon.images.listing import ENDINGS, FOREIGN, LISTS, Listing


@dataclass(frozen=True)
class Place:
    """What a person has named: something that exists, and the rest of the path, which lies inside it."""

    root: str
    inside: str = ""

    @property
    def kind(self) -> str | None:
        """ "tar", "zip", "parquet", "list", "file", or None for a folder."""
        name, distant = self.root.rpartition("/")[2], files.REMOTE.match(self.root)
        if not distant and os.path.isdir(self.root):
            return None
        if listing.ending_of(name) in LISTS:
            return "list"
        return containers.kind(name) or ("file" if not distant or listing.ending_of(name) in ENDINGS else None)


def open_source(*places: Any) -> Index:
    """The index of all images at these places, in this order; within one, by path. An image is listed once.

    A place is a path, a URL, or a data set. Raises UsageError for one that does not exist, cannot be read or holds no
    images.
    """
    if not places:
        raise UsageError("no images given: name a folder, a tar, an image file or an index")
    located = [_locate(str(place)) if isinstance(place, str | Path) else place for place in places]
    named = list(dict.fromkeys(place for place in located if isinstance(place, Place)))
    names = _names([place.root for place in named])
    opened = {place: _open(place, names[place.root]) for place in named}
    parts = [opened.pop(p, None) if isinstance(p, Place) else _dataset(p) for p in located]  # each once
    index = Index.concat([part for part in parts if part is not None])
    return index if len(parts) == 1 else _once(index)


def _once(index: Index) -> Index:
    """The same images, each where it stands first."""
    where = zip(index.column("container"), index.column("offset"))
    first = {place: row for row, place in reversed(list(enumerate(where)))}
    if len(first) == len(index):
        return index
    rows, end, left = sorted(first.values()), 0, []
    for part in index.parts:
        left.append(sum(end <= row < end + part for row in rows))
        end += part
    return replace(index.take(rows), parts=tuple(left))


def _locate(path: str) -> Place:
    """The folder or file that exists, and the rest of the path, which lies inside it."""
    if files.REMOTE.match(path):
        parts = path.rstrip("/").split("/")
        holds = [bool(containers.kind(part)) or listing.ending_of(part) in LISTS for part in parts]
        end = next((i + 1 for i in range(3, len(parts)) if holds[i]), len(parts))
        return Place("/".join(parts[:end]), "/".join(parts[end:]))
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    root = next(p for p in (whole, *whole.parents) if os.path.exists(p))
    inside = whole.relative_to(root).as_posix() if root != whole else ""
    if inside and root.is_dir():
        missing = inside.split("/")[0]
        raise UsageError(f"{path}: there is no {missing!r} in {root}{listing.closest(missing, _entries(root))}")
    if inside and not containers.kind(root.name):
        raise UsageError(f"{path}: {root.name} is a file, not a folder, tar, zip or Parquet: nothing lies inside it")
    return Place(str(root), inside)


def _names(roots: Iterable[str]) -> dict[str, str]:
    """What the paths of each source start with: as few of its last parts as tell all of them apart."""
    roots = list(dict.fromkeys(roots))
    parted = {root: [part for part in root.split("/") if part] for root in roots}
    names: dict[str, str] = {}
    for count in range(1, max(map(len, parted.values()), default=0) + 1):
        names = {root: "/".join(parts[-count:]) for root, parts in parted.items()}
        if len(set(names.values())) == len(roots):
            break
    return names


def _artifact(root: str) -> Index | None:
    """The images that an artifact of ours lists; None for anything else."""
    try:
        with files.open_file(join(root, run.MANIFEST)) as file:
            found = json.load(file)
        kind, name = found["kind"], found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody else's
        return None
    images = join(root, "images.parquet")
    if kind not in ("index", "embeddings", "selection") or not files.exists(images):
        raise UsageError(f"{root}: is {run.article(kind)}, which holds no images: give a folder, a tar, an index ...")
    mapped = Path(root, "images.arrow")
    if mapped.exists():
        return Index.map(mapped, root, name)
    with files.open_file(images) as file:
        table = usable(pq.read_table(file))
    if not table.num_rows:
        raise UsageError(f"{root}: this {kind} is left with no image")
    index = Index(table.select(SCHEMA.names), home=root)
    index = replace(index, table=index.rows(), home="")
    places = pc.unique(index.table["container"]).to_pylist()
    for container in [c for c in places if containers.kind(c)] or places[:1]:
        if not files.REMOTE.match(container) and not os.path.exists(container.partition(containers.COLUMN)[0]):
            raise UsageError(f"{root}: lists images in {container}, which is no longer there")
    return index


def _open(place: Place, name: str) -> Index:
    """One source, its rows sorted by path."""
    root, kind = place.root, place.kind
    if kind is None and (artifact := _artifact(root)) is not None:
        return artifact
    found, prefix = Listing(), f"{name}/" if kind != "file" else ""
    try:
        if kind is None:
            listing.folder(root, prefix, found)
        elif kind == "list":
            listing.text(_real(root), prefix, found)
        elif kind == "file":
            listing.single(_real(root), name, found)
        else:
            listing.into(_real(root), prefix, place.inside, found)
    except OSError as error:
        raise UsageError(f"{root}: cannot be read ({error.strerror or error})") from None
    _tell(f"{root}/{place.inside}" if place.inside else root, found)
    order = sorted(range(len(found.paths)), key=found.paths.__getitem__)
    paths = [found.paths[i] for i in order]
    where = [[column[i] for i in order] for column in (found.containers, found.offsets, found.lengths)]
    return Index(pa.table([paths, *where, *assign(paths, prefix, found.tables, run.say)], schema=SCHEMA))


def _dataset(dataset: Any) -> Index:
    """The items of an object with len() and [row]; what it is called is its own name for itself, or its class."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UsageError(f"data {dataset!r:.80}: neither a path nor a data set with len() and [row]")
    if not len(dataset):
        raise UsageError(f"{type(dataset).__name__}: this data set is empty")
    name = str(getattr(dataset, "_fingerprint", None) or type(dataset).__qualname__)
    paths = [f"{type(dataset).__name__}/{row:0{len(str(len(dataset)))}d}" for row in range(len(dataset))]
    labels = containers.labels_of(dataset) or [None] * len(dataset)
    key, rows = f"object:{name}", list(range(len(dataset)))
    table = pa.table([paths, [key] * len(rows), rows, [-1] * len(rows), labels, [None] * len(rows)], schema=SCHEMA)
    return Index(table, objects={key: dataset})


def _tell(shown: str, found: Listing) -> None:
    """UsageError where there is no image; a line about what was left out and might be missed."""
    if not found.paths:
        if not found.others:
            raise UsageError(f"{shown}: is empty; {listing.image_files()}")
        kinds = ", ".join(f"{f'.{ending}' if ending else 'no ending'} {n}" for ending, n in found.others.most_common(5))
        raise UsageError(f"{shown}: no images among {found.others.total()} files ({kinds}); {listing.image_files()}")
    foreign = [
        f"{n} .{ending} pictures, which Pillow does not read" for ending, n in found.others.items() if ending in FOREIGN
    ]
    if left_out := foreign + [f"{n} {what}" for what, n in found.troubles.items()]:
        run.say(f"{shown}: leaves out {', '.join(left_out)}")


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not listing.hidden(name)]


def _real(path: str) -> str:
    """Absolute, folders without links; the last part stays, for its ending says what it is."""
    if files.REMOTE.match(path):
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
