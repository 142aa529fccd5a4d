"""List the images of a source: files of a folder, members of a tar or zip, rows of a table, lines of a list.

Each function adds what it finds to a `Listing`, from which sources.py makes an index.
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
from troodon.images.index import join_path
from troodon.images.labels import TABLE_NAMES, LabelTable, parse_csv, parse_image_list, parse_labels
from troodon.images.members import ParquetTable, list_members, read_columns, refuse_compressed

# File name extensions of the formats that decode.py reads, and of some image formats that it does not.
# fmt: off
IMAGE_EXTENSIONS = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "tif", "tiff", "bmp", "dib", "avif",
    "jp2", "j2k", "jpc", "j2c", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm",
    "qoi", "tga", "ico", "icns", "psd", "dds", "pcx", "sgi", "npy",
))
UNSUPPORTED_EXTENSIONS = frozenset((
    "heic", "heif", "jxl", "svg", "eps", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "raw",
))
# fmt: on
LIST_EXTENSIONS = ("txt", "csv", "tsv")
LARGE_GROUP = 64 << 20  # bytes of a row group, all read for one image; above this, a message recommends `pack`
LISTING_THREADS = 8  # for tars, zips and Parquet files


@dataclass
class Listing:
    """The images of one source, as columns, and its other files."""

    paths: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: dict[str, LabelTable] = field(default_factory=dict)  # by folder: see labels.assign_labels
    others: Counter[str] = field(default_factory=Counter)  # files that are not images, by extension
    problems: Counter[str] = field(default_factory=Counter)  # what was skipped, by description

    def add(self, path: str, container: str, offset: int, length: int) -> None:
        self.paths.append(path)
        self.containers.append(container)
        self.offsets.append(offset)
        self.lengths.append(length)


def list_folder(root: str, prefix: str, listing: Listing) -> None:
    """List all images below a folder, also in the containers that it holds."""
    entries = _walk_remote(root) if files.REMOTE.match(root) else _walk(root, listing)
    inner = []
    for path, location, size in entries:
        if any(map(is_hidden, path.split("/"))):
            continue
        suffix, name = extension(path), path.rpartition("/")[2]
        if suffix in IMAGE_EXTENSIONS:
            listing.add(prefix + path, location, 0, size)
        elif containers.kind(path):
            inner.append((location, f"{prefix}{path}/"))
        else:
            listing.others[suffix] += 1
            if name in TABLE_NAMES:
                _add_table(listing, prefix + path[: -len(name)], name, files.read(location))

    def list_inner(container: str, prefix: str) -> Listing | str:
        part = Listing()
        try:
            list_container(container, prefix, "", part, named=False)
        except (UsageError, OSError) as error:
            return f"{container}: {error}" if isinstance(error, OSError) else str(error)
        return part

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for (container, _), part in zip(inner, pool.map(lambda args: list_inner(*args), inner)):
            if isinstance(part, str):
                run.say(part)
                listing.problems["files that cannot be opened"] += 1
                continue
            if not part.paths:
                listing.others[containers.kind(container) or ""] += 1
            for column in ("paths", "containers", "offsets", "lengths"):
                getattr(listing, column).extend(getattr(part, column))
            listing.tables.update(part.tables)
            listing.others.update(part.others)
            listing.problems.update(part.problems)


def _walk(root: str, listing: Listing) -> Iterator[tuple[str, str, int]]:
    """Yield the relative path, full path and length of every file below a folder. Linked folders come last, so that a
    file that is reached in two ways keeps its own path."""
    folders, links, visited = [(os.path.realpath(root), "")], [], set()
    while folders or links:
        if not folders:
            links.sort(key=lambda link: link[1])
            folders.append(links.pop(0))
        folder, path = folders.pop()
        if folder in visited:
            continue
        visited.add(folder)
        try:
            entries = list(os.scandir(folder))
        except OSError:
            if len(visited) == 1:
                raise
            listing.problems["folders that cannot be read"] += 1
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                mode, size = (info := entry.stat()).st_mode, info.st_size
                entry.name.encode()
            except OSError:
                listing.problems["links that lead nowhere"] += 1
                continue
            except UnicodeEncodeError:
                listing.problems["names that are not UTF-8"] += 1
                continue
            if stat.S_ISDIR(mode):
                linked = entry.is_symlink()
                target = os.path.realpath(entry.path) if linked else entry.path
                (links if linked else folders).append((target, f"{path}{entry.name}/"))
            elif stat.S_ISREG(mode):
                yield path + entry.name, entry.path, size


def _walk_remote(url: str) -> Iterator[tuple[str, str, int]]:
    """Yield the relative path, URL and length, -1 if unknown, of every file below a remote folder, sorted by path."""
    fs, name = files.filesystem(url)
    entries = files.retry(url, lambda: fs.find(name, detail=True))
    top = name.rstrip("/") + "/"
    for path, info in sorted(entries.items()):
        if info.get("type", "file") == "file" and path.startswith(top):
            size = info.get("size")
            yield path[len(top) :], fs.unstrip_protocol(path), -1 if size is None else size


def list_container(container: str, prefix: str, inside: str, listing: Listing, named: bool = True) -> None:
    """List the images of a tar, zip or Parquet file, or only those at the path `inside` it.

    A Parquet table of paths and URLs counts as a list only if the user `named` it. One that was found beside the
    images describes them.
    """
    if containers.kind(container) == "parquet":
        return _list_parquet(container, prefix, inside, listing, named)
    members = list_members(container, is_hidden)
    *above, last = inside.split("/")
    last = re.escape(last).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    pattern = re.compile("/".join([*map(re.escape, above), last]) + "(/|$)" if inside else "")
    selected = [name for name in members.locations if pattern.match(name)]
    if inside and not selected:
        raise _not_inside(container, inside, list(members.locations))
    for name in selected:
        if (suffix := extension(name)) in IMAGE_EXTENSIONS:
            listing.add(prefix + name, container, *members.locations[name])
        else:
            listing.others[suffix] += 1
    for name, (offset, length) in members.locations.items():
        folder, _, last = name.rpartition("/")
        if last in TABLE_NAMES:
            data = containers.read(container, offset, length)
            _add_table(listing, f"{prefix}{folder}/" if folder else prefix, last, data)
    if members.classes and prefix not in listing.tables:
        keys = {name: name.rpartition(".")[0] for name in selected}
        labels: dict[str, str | None] = {n: members.classes[key] for n, key in keys.items() if key in members.classes}
        listing.tables[prefix] = LabelTable(frozenset(labels), labels, None)
    if members.unsupported:
        listing.problems["files that are encrypted, or compressed by an unsupported method"] += members.unsupported


def _list_parquet(container: str, prefix: str, inside: str, listing: Listing, named: bool) -> None:
    table = read_columns(container, inside or None)
    if table is None or table.image_column is None:
        if named and table is not None and _list_named_images(container, table, prefix, listing):
            return
        listing.others["parquet"] += 1
        return
    if table.largest_group_bytes > LARGE_GROUP:
        size = f"{table.largest_group_bytes >> 20:,} MB"
        run.say(f"{container}: to read one image means to read {size}; `troodon pack` it first for fast training")
    names = [f"{row:0{len(str(table.rows))}d}" for row in range(table.rows)]
    for row, name in enumerate(names):
        listing.add(prefix + name, f"{container}{containers.COLUMN_SEPARATOR}{table.image_column}", row, -1)
    listing.tables[prefix] = parse_labels(names, table.columns.to_pydict(), table.class_names)


def _list_named_images(container: str, table: ParquetTable, prefix: str, listing: Listing) -> bool:
    named = parse_image_list(table.columns.to_pydict(), table.class_names)
    if named is not None:
        _add_named_images(container, prefix, named[0], listing)
        listing.tables[prefix] = named[1]
    return named is not None


def list_text_file(container: str, prefix: str, listing: Listing) -> None:
    """List the images that a text file or a CSV table names, one per line."""
    suffix = extension(container)
    data = files.read(container)
    if suffix == "txt":
        try:
            names = list(dict.fromkeys(filter(None, map(str.strip, data.decode("utf-8-sig").splitlines()))))
        except UnicodeDecodeError:
            raise UsageError(f"{container}: is not text in UTF-8") from None
        return _add_named_images(container, prefix, names, listing)
    named = parse_image_list(parse_csv(data, "\t" if suffix == "tsv" else ",") or {}, {})
    if named is None:
        raise UsageError(f"{container}: has no column `path` or `url` that names images")
    _add_named_images(container, prefix, named[0], listing)
    listing.tables[prefix] = named[1]


def _add_named_images(container: str, prefix: str, names: list[str], listing: Listing) -> None:
    folder = container.rpartition("/")[0]
    missing = []
    for name in names:
        location, length = name if files.REMOTE.match(name) else join_path(folder, name), -1
        if not files.REMOTE.match(name) and extension(name) not in IMAGE_EXTENSIONS:
            listing.others[extension(name)] += 1
            continue
        if not files.REMOTE.match(location):
            try:
                length = os.stat(location).st_size
            except OSError:
                missing.append(name)
        listing.add(prefix + name.lstrip("/"), location, 0, length)
    if missing and len(missing) == len(names):
        raise UsageError(f"{container}: none of the {len(names):,} files that it names exists; the first: {names[0]}")
    if missing:
        run.say(f"{container}: {len(missing):,} of the files that it names do not exist; the first: {missing[0]}")


def list_file(root: str, name: str, listing: Listing) -> None:
    """List a single image file. Raises UsageError if it is another kind of file."""
    if not files.REMOTE.match(root):
        refuse_compressed(root)
        with open(root, "rb") as file:
            start = file.read(512)
        for magic, offset, kind in ((b"ustar", 257, "tar"), (b"PK\x03\x04", 0, "zip"), (b"PAR1", 0, "parquet")):
            if start[offset : offset + len(magic)] == magic:
                raise UsageError(f"{root}: is a {kind}, but its name does not end in .{kind}: rename it")
    if extension(name) not in IMAGE_EXTENSIONS:
        raise UsageError(f"{root}: does not have the name of an image; {extensions_hint()}")
    listing.add(name, root, 0, files.size(root))


def _add_table(listing: Listing, folder: str, name: str, data: bytes) -> None:
    named = parse_image_list(parse_csv(data) or {}, {})
    table = named[1] if named is not None and (named[1].labels is not None or named[1].splits is not None) else None
    if table is not None and (name == TABLE_NAMES[0] or folder not in listing.tables):
        listing.tables[folder] = table
    elif table is None and name == TABLE_NAMES[0]:
        run.say(f"{folder}{name}: has no columns `path` and `label` (or `split`), and is ignored")


def _not_inside(container: str, inside: str, names: list[str]) -> UsageError:
    """An error that names the first part of `inside` that does not exist, and the most similar one that does."""
    parent = ""
    for part in inside.split("/"):
        known = {name[len(parent) :].split("/")[0] for name in names if name.startswith(parent)}
        if part not in known:
            break
        parent += f"{part}/"
    return UsageError(f"{container}/{inside}: there is no {part!r} in {container}/{parent}{suggest(part, known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, or the first six."""
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f", only {', '.join(known[:6])}{' ...' if len(known) > 6 else ''}" if known else ", which is empty"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name.startswith(".") or name in ("__MACOSX", "embeddings.npy")  # the last: part of our artifacts


def extension(name: str) -> str:
    """What follows the last dot, in lower case; "" if there is no dot."""
    _, dot, suffix = name.rpartition(".")
    return suffix.lower() if dot else ""


def extensions_hint() -> str:
    return "image files end in .jpg .png .webp .gif .tif .bmp ..."
