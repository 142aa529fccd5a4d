"""What lies at a place: the files of a folder, the members of a tar or zip, the rows of a table, the lines of a list.

Each function adds what it finds to a `Listing`; sources.py makes an index of it.
"""

import difflib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files
from troodon.images.index import join
from troodon.images.labels import TABLES, Table, listed, read_table, spoken

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
# fmt: on
LISTS = ("txt", "csv", "tsv")
LARGE_GROUP = 64 << 20  # bytes that one image of a Parquet file costs to reach, from which packing is recommended
LISTED_AT_ONCE = 8  # tars, zips and Parquet files


@dataclass
class Listing:
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


def folder(root: str, prefix: str, found: Listing) -> None:
    """All below a folder, and in what it holds."""
    below = files.below(root) if files.REMOTE.match(root) else _walk(root, found)
    inner = []
    for path, place, size in below:
        if any(map(hidden, path.split("/"))):
            continue
        ending, name = ending_of(path), path.rpartition("/")[2]
        if ending in ENDINGS:
            found.add(prefix + path, place, 0, size)
        elif containers.kind(path):
            inner.append((place, f"{prefix}{path}/"))
        else:
            found.others[ending] += 1
            if name in TABLES:
                _table(found, prefix + path[: -len(name)], name, files.read(place))

    def one(container: str, prefix: str) -> Listing | str:
        part = Listing()
        try:
            into(container, prefix, "", part, named=False)
        except (UsageError, OSError) as error:
            return f"{container}: {error}" if isinstance(error, OSError) else str(error)
        return part

    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        for (container, _), part in zip(inner, pool.map(lambda of: one(*of), inner)):
            if isinstance(part, str):
                run.say(part)
                found.troubles["files that cannot be opened"] += 1
                continue
            if not part.paths:
                found.others[containers.kind(container) or ""] += 1
            for column in ("paths", "containers", "offsets", "lengths"):
                getattr(found, column).extend(getattr(part, column))
            found.tables.update(part.tables)
            found.others.update(part.others)
            found.troubles.update(part.troubles)


def _walk(root: str, found: Listing) -> Iterator[tuple[str, str, int]]:
    """Every file below a folder: its path there, the whole, how long it is. Linked folders come last, so that what
    lies in two ways keeps its own path."""
    folders, links, seen = [(os.path.realpath(root), "")], [], set()
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
            if hidden(entry.name):
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
            elif stat.S_ISREG(mode):
                yield path + entry.name, entry.path, size


def into(container: str, prefix: str, inside: str, found: Listing, named: bool = True) -> None:
    """The images of a tar, zip or Parquet file, or of what lies at `inside` in it.

    A table of paths and URLs is one only if it was `named`: beside the images themselves it says what they are.
    """
    if containers.kind(container) == "parquet":
        return _parquet(container, prefix, inside, found, named)
    members = containers.members(container, hidden)
    *above, last = inside.split("/")
    last = re.escape(last).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    wanted = re.compile("/".join([*map(re.escape, above), last]) + "(/|$)" if inside else "")
    chosen = [name for name in members.where if wanted.match(name)]
    if inside and not chosen:
        raise _not_inside(container, inside, list(members.where))
    for name in chosen:
        if (ending := ending_of(name)) in ENDINGS:
            found.add(prefix + name, container, *members.where[name])
        else:
            found.others[ending] += 1
    for name, (offset, length) in members.where.items():
        home, _, last = name.rpartition("/")
        if last in TABLES:
            _table(found, f"{prefix}{home}/" if home else prefix, last, containers.read(container, offset, length))
    if members.classes and prefix not in found.tables:
        said = {name: members.classes[name.rpartition(".")[0]] for name in chosen if name.rpartition(".")[0] in
                members.classes}  # fmt: skip
        found.tables[prefix] = Table(frozenset(said), dict(said), None)
    if members.locked:
        found.troubles["files that are encrypted, or compressed in a way that is not read"] += members.locked


def _parquet(container: str, prefix: str, inside: str, found: Listing, named: bool) -> None:
    table = containers.columns(container, inside or None)
    if table is None or table.images is None:
        if named and table is not None and _listed_in(container, table, prefix, found):
            return
        found.others["parquet"] += 1
        return
    if table.group > LARGE_GROUP:
        size = f"{table.group >> 20:,} MB"
        run.say(f"{container}: one image is reached through {size} of others; `troodon pack` it first, to train fast")
    names = [f"{row:0{len(str(table.rows))}d}" for row in range(table.rows)]
    for row, name in enumerate(names):
        found.add(prefix + name, f"{container}{containers.COLUMN}{table.images}", row, -1)
    found.tables[prefix] = spoken(names, table.table.to_pydict(), table.classes)


def _listed_in(container: str, table: containers.Columns, prefix: str, found: Listing) -> bool:
    said = listed(table.table.to_pydict(), table.classes)
    if said is not None:
        _entries_of(container, prefix, said[0], found)
        found.tables[prefix] = said[1]
    return said is not None


def text(container: str, prefix: str, found: Listing) -> None:
    """The images that a text or a table names, one a line."""
    ending = ending_of(container)
    data = files.read(container)
    if ending == "txt":
        try:
            names = list(dict.fromkeys(filter(None, map(str.strip, data.decode("utf-8-sig").splitlines()))))
        except UnicodeDecodeError:
            raise UsageError(f"{container}: is no text in UTF-8") from None
        return _entries_of(container, prefix, names, found)
    said = listed(read_table(data, "\t" if ending == "tsv" else ",") or {}, {})
    if said is None:
        raise UsageError(f"{container}: has no column path or url that names images")
    _entries_of(container, prefix, said[0], found)
    found.tables[prefix] = said[1]


def _entries_of(container: str, prefix: str, names: list[str], found: Listing) -> None:
    home = container.rpartition("/")[0]
    missing = []
    for name in names:
        place, length = name if files.REMOTE.match(name) else join(home, name), -1
        if not files.REMOTE.match(name) and ending_of(name) not in ENDINGS:
            found.others[ending_of(name)] += 1
            continue
        if not files.REMOTE.match(place):
            try:
                length = os.stat(place).st_size
            except OSError:
                missing.append(name)
        found.add(prefix + name.lstrip("/"), place, 0, length)
    if missing and len(missing) == len(names):
        raise UsageError(f"{container}: none of the {len(names):,} files that it names is there; the first: {names[0]}")
    if missing:
        run.say(f"{container}: {len(missing):,} of the files that it names are not there; the first: {missing[0]}")


def single(root: str, name: str, found: Listing) -> None:
    if not files.REMOTE.match(root):
        containers.refuse_compressed(root)
        with open(root, "rb") as file:
            start = file.read(512)
        for magic, at, what in ((b"ustar", 257, "tar"), (b"PK\x03\x04", 0, "zip"), (b"PAR1", 0, "parquet")):
            if start[at : at + len(magic)] == magic:
                raise UsageError(f"{root}: is a {what}, but its name does not end in .{what}: rename it")
    if ending_of(name) not in ENDINGS:
        raise UsageError(f"{root}: is not an image by its name; {image_files()}")
    found.add(name, root, 0, files.size(root))


def _table(found: Listing, home: str, name: str, data: bytes) -> None:
    said = listed(read_table(data) or {}, {})
    table = said[1] if said is not None and (said[1].labels is not None or said[1].splits is not None) else None
    if table is not None and (name == TABLES[0] or home not in found.tables):
        found.tables[home] = table
    elif table is None and name == TABLES[0]:
        run.say(f"{home}{name}: has no columns path and label (or split), so it is left aside")


def _not_inside(container: str, inside: str, names: list[str]) -> UsageError:
    """The first part of `inside` that is not there, and the nearest that is."""
    at = ""
    for part in inside.split("/"):
        known = {name[len(at) :].split("/")[0] for name in names if name.startswith(at)}
        if part not in known:
            break
        at += f"{part}/"
    return UsageError(f"{container}/{inside}: there is no {part!r} in {container}/{at}{closest(part, known)}")


def closest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f", only {', '.join(known[:6])}{' ...' if len(known) > 6 else ''}" if known else ", which is empty"


def hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "embeddings.npy")  # the latter: of our own artifacts


def ending_of(name: str) -> str:
    _, dot, ending = name.rpartition(".")
    return ending.lower() if dot else ""


def image_files() -> str:
    return "image files end in .jpg .png .webp .gif .tif .bmp ..."
