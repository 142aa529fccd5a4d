"""Copies and leaks on the page: every group of images that show the same, the most doubtful first, large enough to
judge. What does not fit on the page follows on further pages."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from troodon.images.index import Index
from troodon.report.markup import SPACE, Content, Markup, Part, file_size, h, is_number, join, number
from troodon.report.thumbnails import Frame, thumbnail
from troodon.text import plural

# Shape suffixes: N rows of the ledger, M left-out images in the order of their groups.

COPY_STAGES = ("exact", "hash", "colour", "duplicate")
SIDE = 224  # pixels of a picture's longer side
MEMBERS = 24  # left-out images of a group that are shown
FIRST_PICTURES, PICTURES = 60, 160  # on the page itself, and on each further one
MAX_PARTS = 50
DOUBTFUL_PAIRS = 30  # that are shown
PERHAPS = "perhaps"  # begins the reason of a doubtful one
WHY = "; of that one, which "  # in a reason: what follows is why the other one stays


@dataclass(frozen=True)
class Groups:
    """Images that are left out, by the image that each is a copy of."""

    ledger: Index
    size_of: Callable[[int], str]
    kept_N: ndarray
    row_M: ndarray  # left-out images, group by group, the most doubtful first in each
    start_of: ndarray  # of each group in row_M, and their end
    root_of: ndarray  # the image that each group is a copy of
    order: ndarray  # of the groups, the most doubtful first

    @staticmethod
    def find(ledger: Index, size_of: Callable[[int], str], stages: Sequence[str]) -> "Groups":
        """Groups of what these stages have left out. A copy of a copy belongs to the last one."""
        stage_N = np.array(ledger.column("stage"), object)
        kept_N, cause_N = ledger.table["kept"].to_numpy(), ledger.table["cause"].to_numpy().copy()
        score_N = ledger.table["score"].to_numpy().astype(float)
        gone_N = ~kept_N & np.isin(stage_N, stages) & (cause_N >= 0) & (cause_N < len(kept_N))
        root_N = np.where(gone_N, cause_N, np.arange(len(kept_N)))
        for _ in range(len(COPY_STAGES)):  # longer chains do not occur
            root_N = root_N[root_N]
        rows = np.flatnonzero(gone_N & (root_N != np.arange(len(kept_N))))
        reasons = ledger.table["reason"].take(rows).to_pylist()
        is_doubtful_M = np.array([(reason or "").startswith(PERHAPS) for reason in reasons], bool)
        doubt_M = np.nan_to_num(score_N[rows], nan=1.0) - is_doubtful_M
        by_group = np.lexsort((rows, doubt_M, root_N[rows]))
        rows, doubt_M = rows[by_group], doubt_M[by_group]
        start_of = np.flatnonzero(np.r_[True, np.diff(root_N[rows]) != 0][: len(rows)])
        order = np.lexsort((root_N[rows[start_of]], doubt_M[start_of]))
        return Groups(ledger, size_of, kept_N, rows, np.r_[start_of, len(rows)], root_N[rows[start_of]], order)

    def pages(self) -> Iterator[tuple[int, int]]:
        """The first and last place in the order of the groups of each page."""
        shown = np.minimum(np.diff(self.start_of), MEMBERS)[self.order] + 1
        first, count, most = 0, 0, FIRST_PICTURES
        for place, pictures in enumerate(shown.tolist()):
            if count and count + pictures > most:
                yield first, place
                first, count, most = place, 0, PICTURES
            count += pictures
        if count:
            yield first, len(shown)

    def show(self, first: int, last: int, what: str) -> Markup:
        """These groups, by their places in the order."""
        return h("div", (self._group(int(group), what) for group in self.order[first:last]), class_="copies")

    def _group(self, group: int, what: str) -> Markup:
        rows, root = self.row_M[self.start_of[group] : self.start_of[group + 1]].tolist(), int(self.root_of[group])
        cells = [self._picture(root, self._root_words(root, rows, what), True)]
        cells += [self._picture(row, self._words(row, root)) for row in rows[:MEMBERS]]
        more = f"and {number(len(rows) - MEMBERS)} more: see selection.csv" if len(rows) > MEMBERS else None
        return h("div", cells, h("p", more, class_="note") if more else None, class_="copy-group")

    def _picture(self, row: int, words: Content, kept: bool = False) -> Markup:
        path = self.ledger.path(row)
        caption = join(
            h("span", path.rpartition("/")[2], class_="file", title=path), h("span", self.size_of(row)), words
        )
        return thumbnail(self.ledger, row, Frame(caption, kept), SIDE)

    def _root_words(self, root: int, rows: list[int], what: str) -> Content:
        """Why this one stays, or by which stage it went later."""
        reasons = self.ledger.table["reason"]
        if what:
            return h("span", what)
        if not self.kept_N[root]:
            return h("span", f"stays here, left out later: {reasons[root].as_py()}")
        why = (reasons[row].as_py().partition(WHY)[2] for row in rows[: 10 * MEMBERS])
        found = [words for words in dict.fromkeys(why) if words and words != "stays in the same group"]
        return h("span", f"kept: the one {', '.join(f'which {words}' for words in found[:3])}" if found else "kept")

    def _words(self, row: int, root: int) -> Content:
        reason, _, why = (self.ledger.table["reason"][row].as_py() or "").partition(WHY)
        cause = int(self.ledger.table["cause"][row].as_py())
        of = f" of {self.ledger.path(cause).rpartition('/')[2]}" if cause != root else ""
        return join(
            h("span", reason + of), h("span", f"kept is the one which {why}") if why and cause == root else None
        )


def copies_figure(ledger: Index, folder: Path) -> tuple[Content, list[Part]]:
    """The groups of copies: the first of them, and further pages of the others."""
    groups = Groups.find(ledger, _sizes(folder, ledger), COPY_STAGES)
    caption = (
        "The most doubtful groups come first, and those of equal files last. A blue edge marks the image that is "
        "kept in place of the others. Under each other one is how well its pixels agree with those of the kept one, "
        "and why that one stays."
    )
    return _figure(groups, "Copies", plural(len(groups.order), "group"), caption, "")


def leaks_figure(ledger: Index, folder: Path) -> tuple[Content, list[Part]]:
    """Images that resemble one of a benchmark, beside that one."""
    groups = Groups.find(ledger, _sizes(folder, ledger), ("benchmark",))
    caption = (
        "A blue edge marks an image of the benchmark; what resembles it is left out. The most doubtful come first."
    )
    images = plural(len(groups.order), "image")
    return _figure(groups, "Images of a benchmark", f"{images} of it", caption, "of the benchmark")


def doubtful_figure(ledger: Index, folder: Path) -> Content:
    """Pairs of kept images that a closer look took for copies only nearly."""
    path = folder / "doubtful.parquet"
    if not path.is_file():
        return None
    pairs = [p for p in pq.read_table(path).to_pylist() if max(p["row"], p["other"]) < len(ledger)]
    if not pairs:
        return None
    size_of, shown = _sizes(folder, ledger), pairs[:DOUBTFUL_PAIRS]

    def picture_of(row: int, *words: Content) -> Markup:
        name = h("span", ledger.path(row).rpartition("/")[2], class_="file", title=ledger.path(row))
        return thumbnail(ledger, row, Frame(join(name, h("span", size_of(row)), *words)), SIDE)

    groups = []
    for pair in shown:
        why = h("span", f"{pair['why']}, agreement {pair['score']:.2f}")
        groups.append(h("div", picture_of(pair["row"]), picture_of(pair["other"], why), class_="copy-group"))
    where = "all are here" if len(shown) == len(pairs) else f"the first {len(shown)} are here"
    text = (
        f"{plural(len(pairs), 'pair')} of kept images nearly passed for copies: {where}, those that agree most first. "
        "Below is what was not enough. At most 1,000 pairs are listed, in doubtful.parquet."
    )
    return join(h("p", "Kept, perhaps copies", class_="sub"), h("p", text, class_="prose"),
                h("div", groups, class_="copies"))  # fmt: skip


def _figure(groups: Groups, title: str, count: str, caption: str, what: str) -> tuple[Content, list[Part]]:
    pages = list(groups.pages())
    if not pages:
        return None, []
    further = [] if groups.ledger.is_remote else pages[1 : 1 + MAX_PARTS]
    parts = [Part(f"{title}, {first + 1:,} to {last:,} of {len(groups.order):,}", _later(groups, first, last, what))
             for first, last in further]  # fmt: skip
    shown = (further or pages)[-1 if further else 0][1]
    first = pages[0][1]
    where = "all are here" if first == len(groups.order) else f"the first {number(first)} are here"
    where += "" if not further else f", further ones on {plural(len(further), 'page')}"
    where += "" if shown == len(groups.order) else f"; the others, from {number(shown + 1)} on, are in selection.csv"
    text = h("p", f"{count} in all: {where}. {caption}", class_="prose")
    return join(h("p", title, class_="sub"), text, groups.show(0, first, what)), parts


def _later(groups: Groups, first: int, last: int, what: str) -> Callable[[], Markup]:
    return lambda: groups.show(first, last, what)


def _sizes(folder: Path, ledger: Index) -> Callable[[int], str]:
    """Size in pixels and bytes of an image, in words, as far as known."""
    path, sizes = folder / "embeddings" / "images.parquet", None
    if path.is_file():
        try:
            sizes = pq.read_table(path, columns=["width", "height"])
        except (pa.ArrowInvalid, OSError):
            sizes = None
    if sizes is not None and len(sizes) != len(ledger):
        sizes = None

    def words(row: int) -> str:
        length, found = ledger.table["length"][row].as_py(), []
        if sizes is not None and is_number(width := sizes["width"][row].as_py()):
            found.append(f"{number(width)} x {number(sizes['height'][row].as_py())}".replace(" ", SPACE))
        if is_number(length) and length >= 0:
            found.append(file_size(length))
        return ", ".join(found)

    return words


def marked_figure(ledger: Index, shown: int = 8) -> Content:
    """Images by their marks, such as those that are out of focus."""
    if "marks" not in ledger.table.column_names:
        return None
    rows_of: dict[str, list[int]] = {}
    for row, marks in enumerate(ledger.column("marks")):
        for mark in (marks or "").split():
            rows_of.setdefault(mark, []).append(row)
    if not rows_of:
        return None
    strips = []
    for mark, rows in sorted(rows_of.items()):
        title = h("p", f"{mark}: {plural(len(rows), 'image')}", class_="note")
        cells = (thumbnail(ledger, row, Frame(_score(ledger, mark, row))) for row in rows[:shown])
        strips.append(h("div", title, h("div", cells, class_="strip")))
    text = "Images that a score marks as perhaps blurred, dark, blank, tiny or elongated. None is left out for it."
    return join(h("p", "Marked images", class_="sub"), h("p", text, class_="prose"), h("div", strips, class_="groups"))


def _score(ledger: Index, mark: str, row: int) -> str:
    name = f"score_{re.split('[<>]', mark)[0]}"
    return number(ledger.table[name][row].as_py()) if name in ledger.table.column_names else ""
