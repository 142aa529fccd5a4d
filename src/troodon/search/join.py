"""All near pairs of a matrix, by whatever search: one function, one kind of edge.

An edge is (i, j, score): rows i < j (int64) and their cosine (float32), always computed again from the two rows, above
the threshold. A search first lays the rows out, then gives edges partition by partition, which may be done anywhere and
in any order. An edge comes once; from faiss, where its rows lie in two partitions, perhaps twice.

    exact    tiles of the whole matrix; finds everything
    lists    inverted lists of our own (lists.py): most of it, far sooner
    faiss    an inverted file with product quantisation, for matrices larger than memory (extra `faiss`)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy import ndarray

from troodon.config import nearest
from troodon.search.exact import band, top_k
from troodon.search.lists import Lists

How = Literal["auto", "exact", "lists", "faiss"]
EXACT_UP_TO = 500_000  # rows: from there on the exact join takes ten minutes and more of two cores
AUDITED = 10_000
Z = 1.96  # standard deviations that hold 95 % of a normal distribution


class Layout(Protocol):
    """Rows laid out to be searched, in len() partitions."""

    def __len__(self) -> int: ...
    def near(self, x_ND: ndarray, threshold: float, at: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]: ...


@dataclass(frozen=True)
class Tiles:
    """Nothing is laid out: partition `at` is one band of tiles of the exact join."""

    rows: int
    device: Any = None
    block: int = 4096

    def __len__(self) -> int:
        return -(-self.rows // self.block)

    def near(self, x_ND: ndarray, threshold: float, at: int) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        return band(x_ND, threshold, at * self.block, block=self.block, device=self.device)

    def save(self, folder: Path) -> None:
        np.save(folder / "tiles.npy", np.array([self.rows, self.block]))

    @staticmethod
    def load(folder: Path, device: Any = None) -> "Tiles":
        rows, block = np.load(folder / "tiles.npy").tolist()
        return Tiles(rows, device, block)


def chosen(how: How, rows: int) -> str:
    """The search that "auto" means for so many rows. UsageError, with the nearest name, for one that is none."""
    if how not in get_args(How):
        raise nearest("search", how, get_args(How))
    return how if how != "auto" else "exact" if rows <= EXACT_UP_TO else "lists"


def lay_out(x_ND: ndarray, how: How = "auto", seed: int = 0, device: Any = None, folder: Path | None = None) -> Layout:
    """Rows laid out for this search; in a folder, where one is given, for `load`. Another `seed` makes other lists,
    which miss other pairs."""
    kind = chosen(how, len(x_ND))
    if kind == "lists" and len(x_ND):
        return Lists.of(x_ND, seed, folder=folder)
    if kind == "faiss" and len(x_ND):
        from troodon.search.quantised import Quantised

        layout = Quantised.of(x_ND, seed)
    else:
        layout = Tiles(len(x_ND), device)
    if folder is not None:
        layout.save(folder)
    return layout


def load(folder: Path, device: Any = None) -> Layout:
    """What a layout saved in this folder."""
    if (folder / "tiles.npy").exists():
        return Tiles.load(folder, device)
    if (folder / "starts.npy").exists():
        return Lists.load(folder)
    from troodon.search.quantised import Quantised

    return Quantised.load(folder)


def near(
    x_ND: ndarray, threshold: float, how: How = "auto", seed: int = 0, device: Any = None
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Edges of all rows with a cosine above `threshold`, a tile at a time."""
    layout = lay_out(x_ND, how, seed, device)
    for at in range(len(layout)):
        yield from layout.near(x_ND, threshold, at)


@dataclass(frozen=True)
class Residual:
    """How many of the rows that were looked at resemble another, by exact search; the share with its 95 % interval."""

    looked_at: int
    found: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.found / self.looked_at if self.looked_at else 0.0


def audit(
    x_ND: ndarray, threshold: float, among: ndarray, *, images: int = AUDITED, seed: int = 0, device: Any = None
) -> Residual:
    """Search exactly, for rows drawn `among` some, for any other row of the matrix with a cosine above `threshold`."""
    drawn = np.sort(np.random.default_rng(seed).permutation(among)[:images])
    score_Q2, row_Q2 = top_k(x_ND[drawn], x_ND, 2, device=device)
    return interval(int(((score_Q2 > threshold) & (row_Q2 != drawn[:, None])).any(1).sum()), len(drawn))


def interval(found: int, looked_at: int) -> Residual:
    """Wilson's interval of a share, which is right for few and for none."""
    if not looked_at:
        return Residual(0, 0, 0.0, 1.0)
    p, n = found / looked_at, looked_at
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return Residual(n, found, max(0.0, low), min(1.0, high))
