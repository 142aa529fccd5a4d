"""The decisions that are made on the page: in memory by row, and in the decisions file, each as it is made."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from troodon.explore.collection import Collection
from troodon.images.decisions import Decision, append_decisions, decided_rows, read_decisions

MAX_TAG = 100  # characters
MAX_TAGS = 50  # of one image


class Made:
    """What was decided about the images of a collection."""

    def __init__(self, collection: Collection):
        self.collection, self.lock = collection, threading.Lock()
        self.by_row = decided_rows(read_decisions(collection.decisions_file), collection.images)

    def __len__(self) -> int:
        return sum(made.keep is not None or bool(made.tags) for made in self.by_row.values())

    def of(self, row: int) -> dict | None:
        """The decision about an image, for the page; None for none."""
        made = self.by_row.get(row)
        if made is None or (made.keep is None and not made.tags):
            return None
        return {"keep": made.keep, "tags": list(made.tags), "instead_of": made.instead_of or None}

    def all(self) -> dict[str, dict]:
        return {str(row): found for row in sorted(self.by_row) if (found := self.of(row)) is not None}

    def tagged_like(self, text: str) -> list[int]:
        """Rows with a tag that holds a text."""
        wanted = text.lower()
        return [row for row, made in self.by_row.items() if any(wanted in tag.lower() for tag in made.tags)]

    def problem(self, rows: Sequence[int], changes: Mapping[str, Any]) -> str:
        """What is wrong with these changes of these images; "" if nothing is."""
        count = len(self.collection)
        for name in ("add_tag", "remove_tag"):
            tag = changes.get(name, "tag")
            if not isinstance(tag, str) or not tag.strip() or len(tag) > MAX_TAG:
                return f"{name}: a text of 1 to {MAX_TAG} characters"
        if type(changes.get("keep", True)) is not bool and changes["keep"] is not None:
            return "keep: true, false or null"
        other = changes.get("instead_of")
        if other is not None:
            if type(other) is not int or not 0 <= other < count or len(rows) != 1 or other == rows[0]:
                return "instead_of: one image, kept in place of another one"
            if changes.get("keep") is not True:
                return "instead_of: comes with keep true"
        return ""

    def change(self, rows: Sequence[int], changes: Mapping[str, Any]) -> dict[int, dict | None]:
        """Make these changes, write them to the file, and return the decisions of the images that changed."""
        with self.lock:
            made = {row: self._changed(row, changes) for row in rows}
            other = changes.get("instead_of")
            if other is not None:
                made[other] = replace(self._now(other), keep=False, instead_of="")
            made = {row: decision for row, decision in made.items() if decision != self._now(row)}
            append_decisions(self.collection.decisions_file, made.values())
            self.by_row.update(made)
        return {row: self.of(row) for row in {*rows, *made}}

    def _now(self, row: int) -> Decision:
        if row in self.by_row:
            return self.by_row[row]
        images = self.collection.images
        sha256 = images["sha256"][row].as_py() if "sha256" in images.column_names else None
        return Decision(images["path"][row].as_py(), sha256 or "")

    def _changed(self, row: int, changes: Mapping[str, Any]) -> Decision:
        made = self._now(row)
        if "keep" in changes:
            other = changes.get("instead_of")
            instead_of = "" if other is None else self.collection.images["path"][other].as_py()
            made = replace(made, keep=changes["keep"], instead_of=instead_of)
        if "add_tag" in changes and (tag := changes["add_tag"].strip()) not in made.tags:
            made = replace(made, tags=(*made.tags, tag)[:MAX_TAGS])
        if "remove_tag" in changes:
            made = replace(made, tags=tuple(tag for tag in made.tags if tag != changes["remove_tag"].strip()))
        return made
