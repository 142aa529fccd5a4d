"""Follow the metrics of a run that another process writes: each look reads only what is new."""

import json
import os
from pathlib import Path
from typing import BinaryIO

from troodon.report.runs import Run, ordered


class Follower:
    """Reads metrics.jsonl of a run, of which a last line may be half written, and which may be written anew or be gone.

    Nothing is asked of the process that writes it, and nothing is locked.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._forget()

    def _forget(self) -> None:
        self.lines: list[dict] = []
        self.identity, self.end = None, 0  # of the file, and of the last whole line in it
        self.last = b""  # that line
        self.run: Run | None = None

    def look(self) -> bool:
        """Read what is new; returns whether anything is."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                state = os.fstat(file.fileno())
                changed = self._go_on(file, state)
                file.seek(self.end)
                new = file.read()
        except OSError:
            changed, new = bool(self.lines), b""
            if changed:
                self._forget()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                self.lines.append(record)
        self.end += len(whole)
        self.last = whole.splitlines(keepends=True)[-1] if whole else self.last
        changed = changed or bool(whole) or not self._is_as_it_was()
        if changed:
            self.run = Run(self.folder, self.name, self._config(), *ordered(self.lines))
        return changed

    def _go_on(self, file: BinaryIO, state: os.stat_result) -> bool:
        """Whether this is another file than before, or was cut; it is then read from its start."""
        identity = state.st_dev, state.st_ino
        file.seek(max(0, self.end - len(self.last)))
        same = identity == self.identity and state.st_size >= self.end and file.read(len(self.last)) == self.last
        if not same:
            self._forget()
            self.identity = identity
        return not same

    def _is_as_it_was(self) -> bool:
        """Whether what else is read of its folder is as it was."""
        return self.run is not None and (self.run.config, self.run.has_backbone) == (
            self._config(),
            (self.folder / "backbone" / "backbone.json").is_file(),
        )

    def _config(self) -> str:
        try:
            return (self.folder / "config.yaml").read_text(errors="replace")
        except OSError:
            return ""

    def age(self, now: float) -> float | None:
        """Seconds since something was written; None if nothing was."""
        try:
            return max(0.0, now - (self.folder / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return None
