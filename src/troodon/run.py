"""Folders of artifacts: absent or complete, and saying of themselves what they are.

    manifest.json    kind, fingerprint of what made it, settings, command; written last, so it also means "finished"

Everything is written under another name, flushed to the disk, and renamed.
"""

import contextlib
import json
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from troodon.config import UsageError, differences

MANIFEST = "manifest.json"
doing: list[str] = []  # the words of the command that is being done; none where Python calls
# For processes that do a part of a command, in their environment: its words, as JSON, and the folder where they meet.
DOING, RENDEZVOUS = "TROODON_DOING", "TROODON_RENDEZVOUS"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` so that whoever reads it sees all of it or none."""
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
    """A folder to fill; under its final name, with its manifest, only once the block has ended well."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    write_manifest(partial, kind, fingerprint, settings)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def write_manifest(folder: Path, kind: str, fingerprint: str, settings: dict) -> None:
    said = {"kind": kind, "fingerprint": fingerprint, "settings": settings}
    write_json(folder / MANIFEST, said | ({"command": doing} if doing else {}))


def manifest(folder: Path) -> dict | None:
    """What a finished artifact says of itself; None for anything else."""
    try:
        return read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_done(folder: Path, kind: str, fingerprint: str, settings: dict) -> bool:
    """Whether `folder` already holds this artifact. UsageError, with the differences, if it holds another one."""
    found = manifest(folder)
    if found is None:
        if folder.is_dir() and any(folder.iterdir()) and not folder.with_name(f"{folder.name}.partial").exists():
            raise UsageError(f"{folder}: is not empty and not {article(kind)}; choose a new --out")
        return False
    if found["kind"] != kind:
        raise UsageError(f"{folder}: already holds {article(found['kind'])}; choose a new --out for {article(kind)}")
    if found["fingerprint"] != fingerprint:
        what = "; ".join(differences(found["settings"], settings)) or "the images or the backbone it was made from"
        raise UsageError(f"{folder}: was made with other settings ({what}); choose a new --out, or remove it")
    return True


def article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def environment() -> dict:
    """The versions and the machine that a result depends on."""
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {
        "troodon": version("troodon"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {n: version(n) for n in ("torch", "numpy", "pillow", "simplejpeg", "pyarrow", "scipy")},
    }


class Metrics:
    """metrics.jsonl: one line per record, appended and flushed; the truth about a run."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, ""

    def append(self, record: dict) -> None:
        """Add a line. What the disk has no room for waits, and is written with the next."""
        self.waiting += json.dumps(record) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = self.waiting.encode()
            if file.write(line) == len(line):
                self.waiting = ""
            else:
                file.truncate(size)

    def read(self) -> list[dict]:
        """All whole records; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, step: int) -> None:
        """Forget records of steps from `step` on: a resumed run writes them again. Events stay: they have no step."""
        kept = "".join(f"{json.dumps(r)}\n" for r in self.read() if r.get("step", -1) < step)
        if self.path.exists() and self.path.read_text() != kept:  # a full disk has no room for another file
            write_bytes(self.path, kept.encode())


def say(message: str = "", passing: bool = False) -> None:
    """One line of progress, on standard error; lost where nobody listens any more, such as a closed terminal.

    On a terminal, the next line takes the place of one that is `passing`.
    """
    with contextlib.suppress(OSError):
        start, end = ("\r\x1b[2K", "" if passing else "\n") if sys.stderr.isatty() else ("", "\n")
        print(start + message, end=end, file=sys.stderr, flush=True)
