"""List the images of a source: files of a folder, members of a tar or zip, rows of a table, lines of a list.

Each function adds what it finds to a `Listing` (entries.py), from which sources.py makes an index.
"""

import difflib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from troodon import run
from troodon.config import UsageError
from troodon.images import containers, files, formats, volumes
from troodon.images.entries import Listing
from troodon.images.formats import (
    IMAGE_EXTENSIONS,
    LOOK_BYTES,
    extension,
    extensions_hint,
    find_images,
    has_image_name,
    is_hidden,
    is_image,
)
from troodon.images.index import join_path
from troodon.images.labels import (
    GUESSED,
    TABLE_NAMES,
    LabelTable,
    decode_text,
    parse_image_list,
    parse_labels,
    read_table,
)
from troodon.images.members import ParquetTable, list_members, read_columns, refuse_compressed
from troodon.text import plural

LARGE_GROUP = 64 << 20  # bytes of a row group, all read for one image; above this, a message recommends `pack`
LISTING_THREADS = 8  # for tars, zips and Parquet files


def list_folder(root: str, prefix: str, listing: Listing) -> None:
    """List all images below a folder, also in the containers that it holds."""
    is_remote = files.REMOTE.match(root) is not None
    inner, others = [], dict[str, tuple[str, int]]()
    for path, location, size in _walk_remote(root, listing) if is_remote else _walk(root, listing):
        if has_image_name(path, is_remote):
            listing.add_file(prefix + path, location, size)
        elif containers.kind(path):
            inner.append((location, f"{prefix}{path}/"))
        else:
            others[path] = location, size
    images = set() if is_remote else find_images(others.items(), lambda place: _start_of(place[0]))
    for path, (location, size) in others.items():
        name = path.rpartition("/")[2]
        if path in images:
            listing.add_file(prefix + path, location, size)
        elif not is_remote and not formats.HAS_PYDICOM and formats.is_dicom(_start_of(location)):
            listing.left_out.add_reason("file", f"are DICOM ({formats.INSTALL})", path)
        elif not _add_table(listing, prefix + path[: -len(name)], name, lambda: files.read(location)):  # noqa: B023
            listing.left_out.add(path)

    def list_inner(container: str, prefix: str) -> Listing | str:
        part = Listing()
        try:
            list_container(container, prefix, "", part, named=False)
        except (UsageError, OSError) as error:
            return f"{container}: {error}" if isinstance(error, OSError) else str(error)
        return part

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for (container, inside), part in zip(inner, pool.map(lambda args: list_inner(*args), inner)):
            if isinstance(part, str):
                run.say(part)
                listing.left_out.add_reason("container", "cannot be opened", inside[len(prefix) : -1])
                continue
            if not (part.paths or part.left_out.endings or part.left_out.reasons):
                listing.left_out.add(container)
            for column in ("paths", "containers", "offsets", "lengths"):
                getattr(listing, column).extend(getattr(part, column))
            listing.tables.update(part.tables)
            listing.left_out.update(part.left_out)


def _start_of(path: str) -> bytes:
    """The first bytes of a local file; none if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(LOOK_BYTES)
    except OSError:
        return b""


def is_ours(folder: str, names: set[str]) -> bool:
    """Whether a folder with these files was made by Troodon: an artifact, or one that is being made, holds no data."""
    if folder.endswith(".partial") or {"config.yaml", "metrics.jsonl"} <= names:
        return True
    if {"counts.json", "timings.json"} <= names:  # a part of an unfinished artifact
        return True
    return run.MANIFEST in names and read_manifest(folder) is not None


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of an artifact of Troodon, local or remote; None for any other folder."""
    try:
        with files.open_file(join_path(folder, run.MANIFEST)) as file:
            manifest = json.load(file)
        return manifest if isinstance(manifest["kind"], str) and manifest["fingerprint"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or that of another program
        return None


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
            listing.left_out.add_reason("folder", "cannot be read", path.rstrip("/"))
            continue
        if path and is_ours(folder, {entry.name for entry in entries}):
            listing.left_out.add_reason("folder", "are made by Troodon", path.rstrip("/"))
            continue
        for entry in entries:
            if is_hidden(entry.name):
                listing.left_out.add_hidden(entry.name)
                continue
            try:
                mode, size = (info := entry.stat()).st_mode, info.st_size
                entry.name.encode()
            except OSError:
                listing.left_out.add_reason("link", "are broken", f"{path}{entry.name}")
                continue
            except UnicodeEncodeError:
                name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
                listing.left_out.add_reason("name", "are not UTF-8", f"{path}{name}")
                continue
            if stat.S_ISDIR(mode):
                linked = entry.is_symlink()
                target = os.path.realpath(entry.path) if linked else entry.path
                (links if linked else folders).append((target, f"{path}{entry.name}/"))
            elif stat.S_ISREG(mode):
                yield path + entry.name, entry.path, size
            else:
                listing.left_out.add_reason("name", "are of pipes, sockets or devices", f"{path}{entry.name}")


def _walk_remote(url: str, listing: Listing) -> Iterator[tuple[str, str, int]]:
    """Yield the relative path, URL and length, -1 if unknown, of every file below a remote folder, sorted by path."""
    fs, name = files.filesystem(url)
    entries = files.retry(url, lambda: fs.find(name, detail=True))
    top, names = name.rstrip("/") + "/", dict[str, set[str]]()
    for path in entries:
        folder, _, name = path.rpartition("/")
        names.setdefault(folder, set()).add(name)
    ours = {f"{f}/" for f in names if len(f) > len(top) and is_ours(fs.unstrip_protocol(f), names[f])}
    for folder in sorted(ours):
        listing.left_out.add_reason("folder", "are made by Troodon", folder[len(top) : -1])
    for path, info in sorted(entries.items()):
        if info.get("type", "file") != "file" or not path.startswith(top) or path.startswith(tuple(ours)):
            continue
        if hidden := next(filter(is_hidden, path[len(top) :].split("/")), None):
            listing.left_out.add_hidden(hidden)
            continue
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
    of_class = members.class_files()
    used = {of_class[name] for name in selected if name in of_class}
    for name in selected:
        if extension(name) in IMAGE_EXTENSIONS or name in members.images:
            listing.add(prefix + name, container, *members.locations[name])
        elif name.rpartition("/")[2].lower() not in TABLE_NAMES and name not in used:
            listing.left_out.add(name, in_archive=True)
    for name, (offset, length) in members.locations.items():
        folder, _, last = name.rpartition("/")
        if last.lower() in TABLE_NAMES:
            place = f"{prefix}{folder}/" if folder else prefix
            is_used = _add_table(listing, place, last, lambda: containers.read(container, offset, length))  # noqa: B023
            if not is_used and name in selected:
                listing.left_out.add(name)
    if inside:  # a table may name images of other folders
        listing.tables = {home: replace(table, file="") for home, table in listing.tables.items()}
    if of_class and prefix not in listing.tables:
        labels: dict[str, str | None] = {n: members.classes[of_class[n]] for n in selected if n in of_class}
        listing.tables[prefix] = LabelTable(frozenset(labels), labels, None)
    listing.left_out.update(members.left_out)


def _list_parquet(container: str, prefix: str, inside: str, listing: Listing, named: bool) -> None:
    table = read_columns(container, inside or None)
    if table is None or table.image_column is None:
        if named and table is not None and _list_named_images(container, table, prefix, listing):
            return
        listing.left_out.add(container)
        return
    if table.largest_group_bytes > LARGE_GROUP:
        size = f"{table.largest_group_bytes >> 20:,} MB"
        run.say(f"{container}: to read one image means to read {size}; `troodon pack` it first for fast training")
    names = [f"{row:0{len(str(table.rows))}d}" for row in range(table.rows)]
    for row, name in enumerate(names):
        if row not in table.paths:
            listing.add(prefix + name, f"{container}{containers.COLUMN_SEPARATOR}{table.image_column}", row, -1)
    _add_places(container, listing, [(prefix + names[row], path) for row, path in table.paths.items()])
    listing.tables[prefix] = parse_labels(container, names, table.columns, table.class_names)


def _list_named_images(container: str, table: ParquetTable, prefix: str, listing: Listing) -> bool:
    named = parse_image_list(container, table.columns, table.class_names)
    if named is not None:
        _add_list(container, prefix, *named, list(table.columns), listing)
    return named is not None


def list_text_file(container: str, prefix: str, listing: Listing) -> None:
    """List the images that a text file or a table names, one per line."""
    data = files.read(container)
    try:
        if extension(container) != "txt":
            columns = read_table(data, lambda text: run.say(f"{container}: {text}"))
            named = parse_image_list(container, columns, {})
        else:
            text, encoding = decode_text(data)
            if encoding in GUESSED:
                run.say(f"{container}: {GUESSED[encoding]}")
            names, columns = list(filter(None, map(str.strip, text.splitlines()))), {}
            named = list(dict.fromkeys(names)), parse_labels(container, names, {}, {})
    except ValueError as error:
        raise UsageError(f"{container}: cannot be read as a list ({error})") from None
    if named is None and not columns:
        raise UsageError(f"{container}: has no row below its first line, and names no image")
    if named is None:
        has = ", ".join(columns)
        raise UsageError(f"{container}: has no column `path` or `url` that names images; its columns: {has}")
    _add_list(container, prefix, *named, list(columns), listing)


def _add_list(
    container: str, prefix: str, names: list[str], table: LabelTable, columns: list[str], listing: Listing
) -> None:
    """Add the images that a list names, and its labels; a message says that a table has more columns, but no labels."""
    _add_named_images(container, prefix, names, listing)
    if table.labels is not None or table.splits is not None:
        listing.tables[prefix] = table
    if table.labels is None and len(columns) > (1 if table.splits is None else 2):
        has = ", ".join(columns)
        run.say(f"{container}: gives no labels, since no column is called label or class; its columns: {has}")


def _add_named_images(container: str, prefix: str, names: list[str], listing: Listing) -> None:
    """Add the files that a list names: URLs, and local files with the name or the content of an image."""
    folder, is_remote, images = container.rpartition("/")[0], files.REMOTE.match(container) is not None, []
    for name in names:
        if (
            files.REMOTE.match(name)
            or has_image_name(name, is_remote)
            or (not is_remote and is_image(name, _start_of(join_path(folder, name))))
        ):
            images.append((prefix + name.lstrip("/"), name))
        else:
            listing.left_out.add(name)
    _add_places(container, listing, images)


def _add_places(container: str, listing: Listing, images: list[tuple[str, str]]) -> None:
    """Add images, (path in the index, URL or path from the folder of the container) each."""
    folder, missing = container.rpartition("/")[0], []
    for path, name in images:
        location, length = name if files.REMOTE.match(name) else join_path(folder, name), -1
        if not files.REMOTE.match(location):
            try:
                length = os.stat(location).st_size
            except OSError:
                missing.append(name)
        listing.add_file(path, location, length)
    if missing and len(missing) == len(listing.paths):
        raise UsageError(
            f"{container}: none of the {plural(len(missing), 'file')} that it names exists; the first: {missing[0]}"
        )
    if missing:
        run.say(f"{container}: {len(missing):,} of the files that it names do not exist; the first: {missing[0]}")


def list_file(root: str, name: str, listing: Listing) -> None:
    """List a single image file. Raises UsageError if it is another kind of file."""
    if not files.REMOTE.match(root):
        if has_image_name(name, False) and extension(name) not in formats.RASTER_EXTENSIONS:
            return listing.add_file(name, root, files.size(root))
        if extension(name) in formats.DICOM_EXTENSIONS or volumes.NIFTI_NAME.search(name):
            raise UsageError(f"{root}: is a medical image; {formats.INSTALL} reads it")
        refuse_compressed(root)
        with open(root, "rb") as file:
            start = file.read(512)
        for magic, offset, kind in ((b"ustar", 257, "tar"), (b"PK\x03\x04", 0, "zip"), (b"PAR1", 0, "parquet")):
            if start[offset : offset + len(magic)] == magic:
                raise UsageError(f"{root}: is a {kind}, but its name does not end in .{kind}: rename it")
        if extension(name) not in IMAGE_EXTENSIONS and not is_image(name, start):
            raise UsageError(f"{root}: does not have the name or the content of an image; {extensions_hint()}")
    elif extension(name) not in IMAGE_EXTENSIONS:
        raise UsageError(f"{root}: does not have the name of an image; {extensions_hint()}")
    listing.add_file(name, root, files.size(root))


def _add_table(listing: Listing, folder: str, name: str, read: Callable[[], bytes]) -> bool:
    """Note the table of labels in a file; False if the file is none. Of several the first in TABLE_NAMES counts."""
    rank = TABLE_NAMES.index(name.lower()) if name.lower() in TABLE_NAMES else -1
    if rank < 0:
        return False
    file, columns = folder + name, dict[str, list]()
    try:
        columns = read_table(read(), lambda text: run.say(f"{file}: {text}"))
    except (ValueError, OSError) as error:
        run.say(f"{file}: cannot be read as a table ({error}), and is ignored")
        return False
    named = parse_image_list(file, columns, {})
    table = named[1] if named is not None and (named[1].labels is not None or named[1].splits is not None) else None
    if table is not None:
        before = listing.tables.get(folder)
        if before is None or TABLE_NAMES.index(before.file.rpartition("/")[2].lower()) > rank:
            listing.tables[folder] = replace(table, file=file)
    elif rank < 2:
        has = f"no columns `path` and `label` (or `split`), but {', '.join(columns)}" if columns else "no row"
        run.say(f"{file}: has {has}, and is ignored")
    return table is not None


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
