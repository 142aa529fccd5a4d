"""Find artifacts in the given folders, and read their files: a missing file is None or empty, not an error."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from troodon.config import UsageError
from troodon.run import MANIFEST, read_manifest

KINDS = ("world", "index", "selection", "run", "scores")  # each has a section of its own
MAX_DEPTH = 2


@dataclass(frozen=True)
class Artifact:
    """A finished folder, or a run in progress, which has no manifest yet."""

    folder: Path
    name: str  # path from the given folder on, with /
    kind: str
    fingerprint: str | None
    settings: dict
    command: list[str]  # the words of the command that made it; empty if Python did

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
        """The records of a .jsonl file; incomplete lines are skipped."""
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


def find_artifacts(paths: Sequence[Path]) -> list[Artifact]:
    """Artifacts at these paths or up to two folders below them, sorted within each. UsageError if there is none."""
    if not paths:
        raise UsageError(f"no folder to report on: give one that holds artifacts ({', '.join(KINDS)})")
    artifacts: dict[Path, Artifact] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give one that holds artifacts ({', '.join(KINDS)})")
        for folder in _folders(path.resolve(), MAX_DEPTH):
            name = "/".join([path.resolve().name, *folder.relative_to(path.resolve()).parts])
            artifact = open_artifact(folder, name)
            if artifact is not None:
                artifacts.setdefault(folder, artifact)
    if not any(artifact.kind in KINDS for artifact in artifacts.values()):
        raise UsageError(
            f"{', '.join(map(str, paths))}: no artifact here or up to {MAX_DEPTH} folders below; "
            f"looked for a {MANIFEST} of kind {', '.join(KINDS)}"
        )
    return list(artifacts.values())


def _folders(folder: Path, depth: int) -> list[Path]:
    """The folder and those up to `depth` below it, without hidden and unfinished ones."""
    folders = [folder]
    if depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and child.suffix != ".partial":
                folders += _folders(child, depth - 1)
    return folders


def open_artifact(folder: Path, name: str) -> Artifact | None:
    try:
        found = read_manifest(folder)
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("kind"), str):
        settings, command = found.get("settings") or {}, found.get("command") or []
        return Artifact(folder, name, found["kind"], found.get("fingerprint"), settings, command)
    if (folder / "metrics.jsonl").is_file():
        return Artifact(folder, name, "run", None, {}, [])
    return None
