"""Which artifacts lie in the given folders, and what is read of them: a missing file is nothing, not an error."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from troodon.config import UsageError
from troodon.run import MANIFEST, read_manifest

KINDS = ("world", "index", "selection", "run", "scores")  # those that have a section of their own
DEEP = 2


@dataclass(frozen=True)
class Artifact:
    """A finished folder, or a run that is still going, which has no manifest yet."""

    folder: Path
    name: str  # from the given folder on, with / between
    kind: str
    fingerprint: str | None
    settings: dict
    command: list[str]  # its words; none where it was not made by one

    def json(self, name: str) -> Any:
        """The contents of a JSON file; None where it is missing or is not JSON."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(errors="replace").strip() or None
        except OSError:
            return None

    def lines(self, name: str) -> list[dict]:
        """The records of a .jsonl file; lines that were cut short are left out."""
        records = []
        for line in (self.text(name) or "").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def pictures(self) -> list[Path]:
        return sorted((self.folder / "pictures").glob("*.png"))


def find(paths: Sequence[Path]) -> list[Artifact]:
    """Artifacts at these paths or up to two folders below them, sorted within each. UsageError if there is none."""
    if not paths:
        raise UsageError(f"no folder to report on: give one that holds artifacts ({', '.join(KINDS)})")
    found: dict[Path, Artifact] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give one that holds artifacts ({', '.join(KINDS)})")
        for folder in _folders(path.resolve(), DEEP):
            name = "/".join([path.resolve().name, *folder.relative_to(path.resolve()).parts])
            artifact = _artifact(folder, name)
            if artifact is not None:
                found.setdefault(folder, artifact)
    if not any(artifact.kind in KINDS for artifact in found.values()):
        raise UsageError(
            f"{', '.join(map(str, paths))}: no artifact here or up to {DEEP} folders below; "
            f"looked for a {MANIFEST} of kind {', '.join(KINDS)}"
        )
    return list(found.values())


def _folders(folder: Path, deep: int) -> list[Path]:
    found = [folder]
    if deep:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and child.suffix != ".partial":
                found += _folders(child, deep - 1)
    return found


def _artifact(folder: Path, name: str) -> Artifact | None:
    try:
        said = read_manifest(folder)
    except ValueError:
        said = None
    if isinstance(said, dict) and isinstance(said.get("kind"), str):
        return Artifact(
            folder, name, said["kind"], said.get("fingerprint"), said.get("settings") or {}, said.get("command") or []
        )
    if (folder / "metrics.jsonl").is_file():
        return Artifact(folder, name, "run", None, {}, [])
    return None
