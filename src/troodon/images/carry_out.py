"""Carry out a selection on the disk: move the images that it left out, link or list those that it kept.

Nothing is deleted or overwritten, and everything is checked before anything changes. What is moved stands in moves.json
in the selection, written first; so a killed move goes on, and `undo` moves all back.
"""

import filecmp
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from troodon import run
from troodon.config import UsageError, nearest
from troodon.images import containers, files
from troodon.images.decisions import followed
from troodon.images.index import MIN_MAPPED_IMAGES, MODIFIED, SCHEMA, UNKNOWN, Index
from troodon.lock import alone
from troodon.text import file_size, plural

MOVES = "moves.json"
LINE_BREAK = re.compile(r"[\r\n]")
ACTIONS = {"move": "FOLDER", "links": "FOLDER", "list": "FILE", "undo": ""}  # and what each needs


@dataclass(frozen=True)
class _Image:
    path: str  # its name in the selection
    file: str
    length: int
    modified: int

    def change(self) -> str:
        """What has happened to the file since the selection was made, in words; "" for nothing."""
        try:
            status = os.stat(self.file)
        except OSError:
            return "is gone"
        same = self.length in (-1, status.st_size) and self.modified in (UNKNOWN, status.st_mtime_ns)
        return "" if same else "has changed"


@dataclass(frozen=True)
class Done:
    """What was done, in words, and the command that undoes it; "" if nothing has changed on the disk."""

    text: str
    undo: str = ""


def check_action(action: str, target: str | None = None) -> None:
    """UsageError unless this is an action, with what it needs."""
    if action not in ACTIONS:
        raise nearest("action", action, ACTIONS)
    if ACTIONS[action] and not target:
        raise UsageError(f"{action}: say where to, as in {action} {ACTIONS[action]}")
    if target and not ACTIONS[action]:
        raise UsageError(f"{action} {target}: it takes nothing else")


def move(selection: Path, folder: Path) -> Done:
    """Move the left-out images into `folder`, under the names that they have in the selection.

    Only single files on local disks. Images that could not be read, and those of benchmarks, stay where they are.
    """
    with alone(selection):
        table, folder = _read(selection), folder.expanduser().resolve()
        if (plan := _read_plan(selection)) and plan["folder"] != str(folder):
            raise UsageError(f"{selection}: its left-out images are in {plan['folder']}; undo that first")
        left_out = pc.and_(pc.invert(table["kept"]), pc.not_equal(table["pool"], "benchmark"))
        readable = pc.not_equal(table["stage"], "decode")
        stay = pc.sum(pc.and_(left_out, pc.invert(readable))).as_py() or 0
        if plan is None:
            moved, kept = table.filter(pc.and_(left_out, readable)), table.filter(table["kept"])
            _require_files(moved, selection, "moved")
            images = _images(moved)
            _check_outside(table, folder)
            targets = _targets(images, folder)
            _check_unchanged(images, _images(kept))
            _check_no_links(images, _images(kept))
            _check_room(images, folder)
            moves = [[i.file, str(target), i.length, i.modified] for i, target in zip(images, targets)]
            plan = {"folder": str(folder), "files": moves}
            if moves:
                run.write_json(selection / MOVES, plan)
        else:
            _check_plan(plan, back=False)
        for source, target, *_ in plan["files"]:
            if os.path.lexists(source):
                _move(str(source), str(target))
    size, count = sum(max(0, length) for *_, length, _ in plan["files"]), len(plan["files"])
    text = f"moved {plural(count, 'left-out image')} ({file_size(size)}) to {folder}" if count else "nothing to move"
    if stay:
        text += f"; {plural(stay, 'image')} that cannot be read {'stays' if stay == 1 else 'stay'}"
    return Done(text, "undo" if count else "")


def undo(selection: Path) -> Done:
    """Move everything back that `move` has moved."""
    with alone(selection):
        _read(selection)
        if (plan := _read_plan(selection)) is None:
            raise UsageError(f"{selection}: nothing of it was moved")
        _check_plan(plan, back=True)
        changed = sum(
            bool(_Image("", target, *was).change()) for _, target, *was in plan["files"] if os.path.lexists(target)
        )
        for source, target, *_ in plan["files"]:
            if os.path.lexists(target):
                _move(target, source)
        _remove_empty(Path(plan["folder"]), {os.path.dirname(target) for _, target, *_ in plan["files"]})
        (selection / MOVES).unlink()
    text = f"moved {plural(len(plan['files']), 'image')} back from {plan['folder']}"
    return Done(text + (f"; {changed:,} of them {'has' if changed == 1 else 'have'} changed since" if changed else ""))


def link(selection: Path, folder: Path) -> Done:
    """Make `folder`, of symbolic links to the kept images under the names that they have in the selection."""
    with alone(selection):
        table, folder = _read(selection), Path(os.path.abspath(folder.expanduser()))
        kept = table.filter(table["kept"])
        _require_files(kept, selection, "linked")
        images = _images(kept)
        _check_outside(table, folder)
        wanted = dict(zip(map(str, _targets(images, folder, exists=True)), (image.file for image in images)))
        done = Done(f"{folder} links to {plural(len(images), 'kept image')}", f"rm -r {shlex.quote(str(folder))}")
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f"{folder}: is there and no folder; choose another one")
        if folder.is_dir() and any(folder.iterdir()):
            links = {f"{base}/{name}" for base, _, names in os.walk(folder) for name in names}
            if links == wanted.keys() and all(os.path.islink(x) and os.readlink(x) == wanted[x] for x in links):
                return done
            raise UsageError(f"{folder}: is not empty; choose a new folder")
        _check_unchanged(images)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a command that was killed
        for place, file in wanted.items():
            inside = partial / Path(place).relative_to(folder)
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(file)
        partial.mkdir(parents=True, exist_ok=True)
        partial.replace(folder)
    return done


def kept_list(selection: Path) -> list[str]:
    """The files of the kept images; of images inside a tar, zip or Parquet file, that file and the name in it."""
    table = _read(selection)
    return image_places(table.filter(table["kept"]))


def write_list(selection: Path, file: Path) -> Done:
    """Write the list of kept images, one a line. An existing file is not overwritten."""
    data = lines(kept_list(selection))
    if file.exists() and (not file.is_file() or file.read_bytes() != data):
        raise UsageError(f"{file}: is there; choose a new file")
    if not file.exists():
        run.write_bytes(file, data)
    count = len(data.splitlines())
    return Done(f"{file} lists {plural(count, 'kept image')}", f"rm {shlex.quote(str(file))}")


def lines(names: list[str]) -> bytes:
    """One name a line. UsageError for a name that holds a line break."""
    if (broken := next(filter(LINE_BREAK.search, names), None)) is not None:
        raise UsageError(f"{broken!r}: the name holds a line break, so no list of lines can hold it: rename it")
    return "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")


def image_places(table: pa.Table) -> list[str]:
    """Where each image is: its file, or the container and the name in it."""
    places = []
    for path, container in zip(table["path"].to_pylist(), table["container"].to_pylist()):
        file = containers.file_of(container)
        if _is_file(container) or path == container:
            places.append(file)
        else:
            _, found, inside = f"/{path}".rpartition(f"/{file.rpartition('/')[2]}/")
            places.append(f"{file}/{inside if found else path}")
    return places


def moved_files(selection: Path) -> dict[str, str]:
    """Where files of a selection are that were moved: by file, the present one."""
    plan = _read_plan(selection) or {"files": []}
    return {source: target for source, target, *_ in plan["files"] if not os.path.lexists(source)}


def made_from(selection: Path, index: Index) -> Index:
    """The index that a selection was made from, if `index` is that without the moved images; else `index`."""
    moved = moved_files(selection)
    if not moved or run.read_manifest(selection) is None:
        return index
    table = pq.read_table(selection / "images.parquet")
    table = table.filter(pc.not_equal(table["pool"], "benchmark")).select(SCHEMA.names)
    there = table.filter(pc.invert(pc.is_in(table["container"], pa.array(list(moved), pa.string()))))
    now, names = index.located_table(), ("path", "container", "offset", "length")
    same = len(there) == len(now) and all(there[n].combine_chunks().equals(now[n].combine_chunks()) for n in names)
    return replace(index, table=table, base="", source_lengths=(), mapped_path=None) if same else index


def _read(selection: Path) -> pa.Table:
    """The ledger of a finished selection."""
    if (manifest := run.read_manifest(selection)) is None:
        raise UsageError(f"{selection}: no finished selection; give a folder that dedup or curate has written")
    if manifest["kind"] != "selection":
        raise UsageError(f"{selection}: is {run.article(manifest['kind'])}, not a selection")
    table = pq.read_table(selection / "images.parquet")
    if MODIFIED.name not in table.column_names:
        raise UsageError(f"{selection}: an earlier release made it, which did not record times of files; make it again")
    return followed(table, selection)


def _read_plan(selection: Path) -> dict | None:
    try:
        return json.loads((selection / MOVES).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_file(container: str) -> bool:
    """Whether this is a file of one image, and no container of several."""
    return os.path.isabs(container) and not containers.kind(container) and containers.file_of(container) == container


def _images(table: pa.Table) -> list[_Image]:
    """These images, but for remote ones; of one inside another file, that file."""
    columns = [table[name].to_pylist() for name in ("path", "container", "length", MODIFIED.name)]
    return [
        _Image(path, containers.file_of(container), length if _is_file(container) else -1, modified)
        for path, container, length, modified in zip(*columns)
        if os.path.isabs(container)
    ]


def _require_files(table: pa.Table, selection: Path, what: str) -> None:
    """UsageError if one of these images is remote or inside another file."""
    names = table["container"].to_pylist()
    others = [row for row, container in enumerate(names) if not _is_file(container)]
    if others:
        path, command = table["path"][others[0]].as_py(), f"troodon pack {shlex.quote(str(selection))} --out shards"
        file = containers.file_of(names[others[0]])
        where = f"inside {file}" if os.path.isabs(file) else file if files.REMOTE.match(file) else "in memory"
        raise UsageError(
            f"{selection}: {len(others):,} of {len(names):,} images to be {what} are no files of their own (such as "
            f"{path}, {where}): nothing is changed; `{command}` copies those kept"
        )


def _check_unchanged(*groups: Iterable[_Image]) -> None:
    for image in (image for group in groups for image in group):
        if change := image.change():
            raise UsageError(
                f"{image.file}: {change} since the selection was made: nothing is changed; make the selection again"
            )


def _check_outside(table: pa.Table, folder: Path) -> None:
    """UsageError if `folder` lies in a folder of the images, where it would be found as images of it."""
    roots = set()
    for path, container in zip(table["path"].to_pylist(), table["container"].to_pylist()):
        if container.endswith(f"/{path}"):
            roots.add(container[: len(container) - len(path)] + path.partition("/")[0])
    for root in sorted(roots):
        if folder.is_relative_to(root) or folder.resolve().is_relative_to(os.path.realpath(root)):
            raise UsageError(f"{folder}: lies in {root}, where it would be found as images; choose a folder outside")


def _targets(images: list[_Image], folder: Path, exists: bool = False) -> list[Path]:
    """The place of each image in `folder`. UsageError if two have the same, or something is there."""
    seen: dict[Path, str] = {}
    for image in images:
        inside = [part for part in image.path.split("/") if part not in ("", ".", "..")]
        target = folder.joinpath(*inside)
        if target in seen:
            raise UsageError(f"{seen[target]} and {image.file} would both become {target}: nothing is changed")
        seen[target] = image.file
        if not exists and os.path.lexists(target):
            raise UsageError(f"{target}: is there, and is not overwritten; choose another folder")
    blocked = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), None)
    if blocked is not None and not blocked.is_dir():
        raise UsageError(f"{blocked}: is a file; choose another folder")
    if blocked is not None and not os.access(blocked, os.W_OK | os.X_OK):
        raise UsageError(f"{blocked}: cannot be written; choose another folder")
    return list(seen)


def _check_no_links(images: list[_Image], kept: list[_Image]) -> None:
    """UsageError if a left-out file is a link, or the file behind a kept link: moving it would lose the kept image."""
    behind = {os.path.realpath(image.file): image.file for image in kept}
    for image in images:
        if os.path.islink(image.file):
            raise UsageError(f"{image.file}: is a link; nothing is moved: give the folder of the files themselves")
        if (keeper := behind.get(os.path.realpath(image.file))) is not None:
            raise UsageError(f"{image.file}: the kept {keeper} is a link to it; nothing is moved: list each file once")
        if not os.access(os.path.dirname(image.file), os.W_OK):
            raise UsageError(f"{image.file}: its folder cannot be written; nothing is moved")


def _check_room(images: list[_Image], folder: Path) -> None:
    """UsageError if the images must be copied to another disk, which has not enough room."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    needed = sum(max(0, image.length) for image in images if _device(image.file) != _device(there))
    if needed > (free := shutil.disk_usage(there).free):
        raise UsageError(f"{folder}: has {file_size(free)} left, and {file_size(needed)} would be moved there")


def _device(path: str | Path) -> int:
    return os.stat(path).st_dev


def _check_plan(plan: dict, back: bool) -> None:
    """UsageError if a file of an unfinished move is lost, has changed, or has something else in its way."""
    for source, target, length, modified in plan["files"]:
        start, end = (target, source) if back else (source, target)
        if not os.path.lexists(start) and not os.path.lexists(end):
            raise UsageError(f"{source}: is neither there nor at {target}: nothing is changed; put it back first")
        if os.path.lexists(start) and os.path.lexists(end) and not _is_same(start, end):
            raise UsageError(f"{end}: is there and differs from {start}: nothing is changed; move it away first")
        if not back and os.path.lexists(start):
            _check_unchanged([_Image("", start, length, modified)])


def _is_same(a: str, b: str) -> bool:
    return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)


def _move(source: str, target: str) -> None:
    """Move a file, so that a complete one is there at any moment: by a hard link, or a synced copy to another disk."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.lexists(target):
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # another file system, or one without hard links
            partial = f"{target}.partial"
            shutil.copy2(source, partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.rename(partial, target)
    os.unlink(source)


def _remove_empty(root: Path, folders: Iterable[str]) -> None:
    """Remove those of these folders that are empty, and what they alone were in, up to `root`."""
    for folder in sorted(map(Path, folders), key=lambda place: -len(place.parts)):
        while folder.is_relative_to(root) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def write_lists(selection: Path) -> None:
    """Write selection.csv, a row for each image, and kept.txt and left_out.txt, a place on each line; of more than
    MIN_MAPPED_IMAGES images nothing.

    left_out.txt has the images that `move` moves: neither those that cannot be read nor those of benchmarks.
    """
    table = pq.read_table(selection / "images.parquet")
    if len(table) > MIN_MAPPED_IMAGES:
        return run.say(f"{selection}: no lists as text of so many images; all is in images.parquet")
    places, path, cause = np.array(image_places(table), object), table["path"].combine_chunks(), table["cause"]
    cause = pc.if_else(pc.less(cause, 0), None, cause).combine_chunks()
    columns = {name: table[name] for name in ("path", "kept", "pool", "stage", "reason")}
    score = pc.if_else(pc.is_nan(table["score"]), None, table["score"])
    columns |= {"cause": path.take(cause), "score": score}
    columns |= {name: table[name] for name in ("marks",) if name in table.column_names}
    csv.write_csv(pa.table(columns), selection / "selection.csv")
    kept_N = table["kept"].to_numpy()
    stage, pool = (np.array(table[name].to_pylist(), object) for name in ("stage", "pool"))
    for name, rows in (("kept.txt", kept_N), ("left_out.txt", ~kept_N & (stage != "decode") & (pool != "benchmark"))):
        chosen = [place for place in places[rows] if not LINE_BREAK.search(place)]
        if len(chosen) < rows.sum():
            run.say(f"{name}: leaves out {rows.sum() - len(chosen):,} images with a line break in their names")
        (selection / name).write_bytes(lines(chosen))
