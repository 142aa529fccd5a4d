"""Where images lie: a folder, one file, a tar, a place inside a tar, or an artifact that lists images.

What one finds:

    folder      every file below it whose name ends as images do, and every tar below it as if it were a folder.
                Links are followed; hidden files, __MACOSX and embeddings.npy are left out
    tar         uncompressed and named .tar: its images are read where they lie. `photos.tar/a/b` is the folder a/b
                in it, whose last part may hold * and ?
    artifact    an index or embeddings: the rows that could be read; a selection: the rows it kept

Masks and depth maps are images by their names: give the folder beside them (`camvid.tar/images`) to leave them out.

A `path` starts with the name of its source (`photos/cats/1.jpg`, `shards.tar/a/2.png`); where two sources share a
name, with as much of what lies above them as tells them apart. Labels and splits: see labels.py.
"""

import difflib
import os
import posixpath
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from troodon import run
from troodon.config import UsageError
from troodon.data.index import SCHEMA, Index
from troodon.data.labels import TABLES, Table, assign, read_table

# How the names of the formats end that decode.py reads, and of some pictures that it does not.
# fmt: off
ENDINGS = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "tif", "tiff", "bmp", "dib", "avif",
    "jp2", "j2k", "jpc", "j2c", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm",
    "qoi", "tga", "ico", "icns", "psd", "dds", "pcx", "sgi", "npy",
))
FOREIGN = frozenset((
    "heic", "heif", "jxl", "svg", "eps", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "raw",
))
COMPRESSED = (
    (b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"PK\x03\x04", "unzip"),
)
# fmt: on


@dataclass
class _Found:
    """The images of one source, in columns, and what else lies there."""

    paths: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)  # by folder, as labels.assign wants them
    others: Counter[str] = field(default_factory=Counter)  # files that are no images, by ending
    troubles: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, container: str, offset: int, length: int) -> None:
        self.paths.append(path)
        self.containers.append(container)
        self.offsets.append(offset)
        self.lengths.append(length)


def open_source(*paths: str | Path) -> Index:
    """The index of all images at these places, in this order; within one, by path. An image is listed once.

    Raises UsageError for a place that does not exist, cannot be read or holds no images.
    """
    if not paths:
        raise UsageError("no images given: name a folder, a tar, an image file or an index")
    places = list(dict.fromkeys(_locate(str(path)) for path in paths))
    names = _names([root for root, _ in places])
    index = Index.concat([_open(root, inside, names[root]) for root, inside in places])
    where = zip(index.column("container"), index.column("offset"))
    first = {place: row for row, place in reversed(list(enumerate(where)))}
    return index if len(first) == len(index) else index.take(sorted(first.values()))


def _locate(path: str) -> tuple[Path, str]:
    """The folder or file that exists, and the rest of the path, which lies inside it if it is a tar."""
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    root = next(p for p in (whole, *whole.parents) if os.path.exists(p))
    inside = whole.relative_to(root).as_posix() if root != whole else ""
    if inside and root.is_dir():
        missing = inside.split("/")[0]
        raise UsageError(f"{path}: there is no {missing!r} in {root}{_closest(missing, _entries(root))}")
    if inside and not root.name.endswith(".tar"):
        raise UsageError(f"{path}: {root.name} is a file, not a folder or a tar: nothing lies inside it")
    return root, inside


def _names(roots: Iterable[Path]) -> dict[Path, str]:
    """What the paths of each source start with: as few of its last parts as tell all of them apart."""
    roots = list(dict.fromkeys(roots))
    most = max(len(root.parts) for root in roots)
    for parts in range(1, most + 1):
        names = {root: "/".join(root.parts[-parts:]).lstrip("/") for root in roots}
        if len(set(names.values())) == len(roots):
            break
    return names


def _artifact(root: Path) -> Index | None:
    """The images that an artifact of ours lists; None for anything else."""
    try:
        kind = (run.manifest(root) or {})["kind"] if root.is_dir() else None
    except (ValueError, KeyError, TypeError):  # somebody else's manifest.json
        return None
    if kind is None:
        return None
    if kind not in ("index", "embeddings", "selection") or not (root / "images.parquet").exists():
        raise UsageError(f"{root}: is {run.article(kind)}, which holds no images: give a folder, a tar, an index ...")
    table = Index.load(root / "images.parquet").table
    if "kept" in table.column_names:
        table = table.filter(table["kept"])
    elif "status" in table.column_names:
        table = table.filter(pc.or_kleene(pc.is_null(table["status"]), pc.equal(table["status"], "ok")))
    if not table.num_rows:
        raise UsageError(f"{root}: this {kind} is left with no image")
    containers = pc.unique(table["container"]).to_pylist()
    for container in [c for c in containers if c.endswith(".tar")] or containers[:1]:
        if not os.path.exists(container):
            raise UsageError(f"{root}: lists images in {container}, which is no longer there")
    return Index(table.select(SCHEMA.names))


def _open(root: Path, inside: str, name: str) -> Index:
    """One source, its rows sorted by path."""
    if (listed := _artifact(root)) is not None:
        return listed
    found = _Found()
    prefix = f"{name}/" if root.is_dir() or root.name.endswith(".tar") else ""
    try:
        if root.is_dir():
            _walk(root, prefix, found)
        elif root.name.endswith(".tar"):
            _tar(_real(root), prefix, inside, found)
        else:
            _file(root, name, found)
    except OSError as error:
        raise UsageError(f"{root}: cannot be read ({error.strerror})") from None
    shown = f"{root}/{inside}" if inside else str(root)
    _tell(shown, found)
    order = sorted(range(len(found.paths)), key=found.paths.__getitem__)
    paths = [found.paths[i] for i in order]
    where = [[column[i] for i in order] for column in (found.containers, found.offsets, found.lengths)]
    return Index(pa.table([paths, *where, *assign(paths, prefix, found.tables, run.say)], schema=SCHEMA))


def _walk(root: Path, prefix: str, found: _Found) -> None:
    """All below a folder. Linked folders come last, so that what lies in two ways keeps its own path."""
    folders, links, seen, tars = [(os.path.realpath(root), prefix)], [], set(), []
    while folders or links:
        if not folders:
            links.sort(key=lambda link: link[1])
            folders.append(links.pop(0))
        folder, path = folders.pop()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            entries = list(os.scandir(folder))
        except OSError:
            if len(seen) == 1:
                raise
            found.troubles["folders that cannot be read"] += 1
            continue
        for entry in entries:
            if _hidden(entry.name):
                continue
            try:
                mode, size = (info := entry.stat()).st_mode, info.st_size
                entry.name.encode()
            except OSError:
                found.troubles["links that lead nowhere"] += 1
                continue
            except UnicodeEncodeError:
                found.troubles["names that are not UTF-8"] += 1
                continue
            if stat.S_ISDIR(mode):
                linked = entry.is_symlink()
                target = os.path.realpath(entry.path) if linked else entry.path
                (links if linked else folders).append((target, f"{path}{entry.name}/"))
            elif not stat.S_ISREG(mode):
                continue
            elif (ending := _ending(entry.name)) in ENDINGS:
                found.add(path + entry.name, entry.path, 0, size)
            elif ending == "tar":
                tars.append((entry.path, f"{path}{entry.name}/"))
            else:
                found.others[ending] += 1
                if entry.name in TABLES:
                    _table(found, path, entry.name, Path(entry.path).read_bytes())
    for container, path in tars:
        _tar(container, path, "", found)


def _tar(container: str, prefix: str, inside: str, found: _Found) -> None:
    """The images of a tar, or of what lies at `inside` in it."""
    members = _members(container)
    *above, last = inside.split("/")
    last = re.escape(last).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    wanted = re.compile("/".join([*map(re.escape, above), last]) + "(/|$)" if inside else "")
    chosen = [name for name in members if wanted.match(name)]
    if inside and not chosen:
        raise _not_inside(container, inside, list(members))
    for name in chosen:
        if (ending := _ending(name)) in ENDINGS:
            found.add(prefix + name, container, *members[name])
        else:
            found.others[ending] += 1
    for name, (offset, length) in members.items():
        home, _, last = name.rpartition("/")
        if last in TABLES:
            with open(container, "rb") as file:
                file.seek(offset)
                _table(found, f"{prefix}{home}/" if home else prefix, last, file.read(length))


def _members(container: str) -> dict[str, tuple[int, int]]:
    """Offset and length of each whole regular file in a tar; of two of one name, the later, as unpacking would."""
    size = os.path.getsize(container)
    members: dict[str, tuple[int, int]] = {}
    count, whole = 0, True
    try:
        with tarfile.open(container, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyrefly: ignore[missing-attribute]  # it would keep them, a kilobyte each
                if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                    whole = False  # a size below zero would send tarfile back to where it was, for ever
                    break
                name = posixpath.normpath(member.name).lstrip("/")
                if not member.isreg() or member.issparse() or any(map(_hidden, name.split("/"))):
                    continue
                name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                members[name] = (member.offset_data, member.size)
                count += 1
            tar.fileobj.seek(tar.offset)
            whole = whole and tar.fileobj.read(512) == bytes(512)  # damage too makes tarfile stop without a word
    except (tarfile.TarError, ValueError) as error:
        if not count:
            _refuse_compressed(container)
            raise UsageError(f"{container}: is not a tar ({error})") from None
        whole = False
    if not whole:
        run.say(f"{container}: is cut short or damaged; the {count} files before that are whole and used")
    if count > len(members):
        run.say(f"{container}: {count - len(members)} files have the name of a later one and are left out")
    return members


def _file(root: Path, name: str, found: _Found) -> None:
    _refuse_compressed(root)
    with open(root, "rb") as file:
        if file.read(512)[257:262] == b"ustar":
            raise UsageError(f"{root}: is a tar, but its name does not end in .tar: rename it")
    if _ending(name) not in ENDINGS:
        raise UsageError(f"{root}: is not an image by its name; {_image_files()}")
    found.add(name, _real(root), 0, root.stat().st_size)


def _table(found: _Found, home: str, name: str, data: bytes) -> None:
    table = read_table(data)
    if table is not None and (name == TABLES[0] or home not in found.tables):
        found.tables[home] = table
    elif table is None and name == TABLES[0]:
        run.say(f"{home}{name}: has no columns path and label (or split), so it is left aside")


def _tell(shown: str, found: _Found) -> None:
    """UsageError where there is no image; a line about what was left out and might be missed."""
    if not found.paths:
        if not found.others:
            raise UsageError(f"{shown}: is empty; {_image_files()}")
        kinds = ", ".join(f"{f'.{ending}' if ending else 'no ending'} {n}" for ending, n in found.others.most_common(5))
        raise UsageError(f"{shown}: no images among {found.others.total()} files ({kinds}); {_image_files()}")
    foreign = [
        f"{n} .{ending} pictures, which Pillow does not read" for ending, n in found.others.items() if ending in FOREIGN
    ]
    if left_out := foreign + [f"{n} {what}" for what, n in found.troubles.items()]:
        run.say(f"{shown}: leaves out {', '.join(left_out)}")


def _not_inside(container: str, inside: str, names: list[str]) -> UsageError:
    """The first part of `inside` that is not there, and the nearest that is."""
    at = ""
    for part in inside.split("/"):
        known = {name[len(at) :].split("/")[0] for name in names if name.startswith(at)}
        if part not in known:
            break
        at += f"{part}/"
    return UsageError(f"{container}/{inside}: there is no {part!r} in {container}/{at}{_closest(part, known)}")


def _closest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f", only {', '.join(known[:6])}{' ...' if len(known) > 6 else ''}" if known else ", which is empty"


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not _hidden(name)]


def _refuse_compressed(path: str | Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, tool in COMPRESSED:
        if start.startswith(magic):
            raise UsageError(f"{path}: is compressed, but images are read where they lie: first {tool} {path}")


def _real(path: Path) -> str:
    """Absolute, folders without links; the last part stays, for its ending says what it is."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "embeddings.npy")  # the latter: of our own artifacts


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition(".")
    return ending.lower() if dot else ""


def _image_files() -> str:
    return "image files end in .jpg .png .webp .gif .tif .bmp ..."
