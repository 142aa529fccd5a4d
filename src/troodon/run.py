"""Folders of artifacts, which are either absent or complete, and describe themselves.

    manifest.json    kind, fingerprint of the inputs, settings, command; written last, so it also means "finished"

Everything is written under a temporary name, flushed to the disk, and renamed.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from troodon.config import UsageError, differences
from troodon.text import printable

FULL_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}
# How Arrow, NumPy and torch say that a disk is full where they do not give the number.
SHORT_WRITE = re.compile(
    r"No space left on device|\d+ requested and \d+ written|unexpected pos \d+ vs \d+|StreamWriter failed writing"
)
MANIFEST = "manifest.json"
COMMAND = "TROODON_COMMAND"  # environment variable of processes that do a part of a command: its words, as JSON
REMADE = {"report.html"}  # what is added to a finished artifact, and made again for the next
current_command: list[str] = []  # the words of the command that runs, which manifests record; empty when Python calls


class Interrupted(Exception):
    """A run was asked to stop, by SIGINT or SIGTERM, and has saved everything."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` atomically: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@contextlib.contextmanager
def publish(folder: Path, kind: str, fingerprint: str, settings: dict) -> Iterator[Path]:
    """A folder to fill, which gets its manifest and its final name only when the block ends without an error.

    It replaces an artifact of its kind or an empty folder. UsageError for anything else, which stays as it is.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder, kind)
    partial, old = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old.partial"))
    for left in (partial, old):  # by a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    write_manifest(partial, kind, fingerprint, settings)
    _check_replaceable(folder, kind, {path.name for path in partial.iterdir()})
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(folder: Path, kind: str, names: set[str] | None = None) -> None:
    """UsageError if `folder` is no artifact of that kind; with the `names` of the next one, if it holds more."""
    there = {path.name for path in folder.iterdir()} - {".DS_Store"} if folder.is_dir() else set()
    if not there and not (folder.exists() and not folder.is_dir()):
        return
    if (read_manifest(folder) or {}).get("kind") != kind:
        raise UsageError(f"{folder}: is there and not {article(kind)}; choose another folder")
    if names is not None and (others := sorted(there - names - REMADE)):
        raise UsageError(f"{folder}: also holds {', '.join(others)}; move it away, or choose another folder")


def write_manifest(folder: Path, kind: str, fingerprint: str, settings: dict) -> None:
    manifest = {"kind": kind, "fingerprint": fingerprint, "settings": settings}
    write_json(folder / MANIFEST, manifest | ({"command": current_command} if current_command else {}))


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a finished artifact; None for anything else."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"kind", "fingerprint", "settings"} <= manifest.keys() else None


def is_done(folder: Path, kind: str, fingerprint: str, settings: dict) -> bool:
    """Whether `folder` already holds this artifact. UsageError, with the differences, if it holds another one."""
    manifest = read_manifest(folder)
    if manifest is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty and not {article(kind)}; choose a new --out")
        return False
    if manifest["kind"] != kind:
        raise UsageError(f"{folder}: already holds {article(manifest['kind'])}; choose a new --out for {article(kind)}")
    if manifest["fingerprint"] != fingerprint:
        changes = differences(manifest["settings"], settings) or ["the images or the backbone it was made from"]
        raise UsageError(
            f"{folder}: was made with other settings ({'; '.join(changes)}); choose a new --out, or remove it"
        )
    return True


def article(kind: str) -> str:
    """The kind of an artifact with its article, if it is one thing."""
    return kind if kind.endswith("s") else f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def full_disk(error: BaseException | None) -> str:
    """What to say of an error that a full disk has caused, at any place in its chain; "" of others."""
    while error is not None:
        if any(words in str(error) for words in FULL_DISK.values()):
            return str(error)
        code = getattr(error, "errno", None)
        if code in FULL_DISK or SHORT_WRITE.search(str(error)):
            where = f"{error.filename}: " if getattr(error, "filename", None) else ""
            return f"{where}{FULL_DISK.get(code, FULL_DISK[errno.ENOSPC])}"
        error = error.__cause__ or error.__context__
    return ""


def version(package: str = "troodon") -> str | None:
    """The version of an installed package; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """The versions and the machine that a result depends on."""
    return {
        "troodon": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {n: version(n) for n in ("torch", "numpy", "pillow", "simplejpeg", "pyarrow", "scipy")},
    }


class MetricsFile:
    """metrics.jsonl: one line per record, appended and flushed; the reference for everything that shows a run."""

    def __init__(self, path: Path):
        self.path, self.pending = path, ""

    def append(self, record: dict) -> None:
        """Add a line. If the disk is full, the line is kept and written with the next one."""
        self.pending += json.dumps(record) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = self.pending.encode()
            if file.write(line) == len(line):
                self.pending = ""
            else:
                file.truncate(size)

    def read(self) -> list[dict]:
        """All complete records; a last line that a kill cut short is skipped."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, step: int) -> None:
        """Delete the records of `step` and later: a resumed run writes them again. Events stay: they have no step."""
        kept = "".join(f"{json.dumps(r)}\n" for r in self.read() if r.get("step", -1) < step)
        if self.path.exists() and self.path.read_text() != kept:  # else nothing is written: the disk may be full
            write_bytes(self.path, kept.encode())


_writing = threading.RLock()
_drawing = [""]  # lines at the bottom of the terminal, below what is said


def say(message: str = "") -> None:
    """Print a line of progress on standard error; it is lost if that is closed, such as with its terminal.

    What is drawn stays below it. Control characters, as names may hold, are written out.
    """
    _write("\n".join(map(printable, message.split("\n"))) + "\n", _drawing[0])


def draw(text: str) -> None:
    """Draw these lines at the bottom of the terminal in place of those before; "" takes them away."""
    _write("", text)


def _write(above: str, below: str) -> None:
    with contextlib.suppress(OSError), _writing:
        lines, _drawing[0] = _drawing[0].count("\n"), below
        print((f"\r\x1b[{lines}A\x1b[J" if lines else "") + above + below, end="", file=sys.stderr, flush=True)
