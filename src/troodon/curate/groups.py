"""Groups of verified copies: which image of each is kept, and why, and for which each of the others is dropped.

Every dropped image matches the kept one itself, in groups of every size: copies chain, and a chain may end elsewhere.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from troodon.copies import keeper
from troodon.copies.verify import Match
from troodon.curate.dedup import Edges, Verdict, components

# Shape suffixes: N images, M members of a group.

MAX_RANKED = 64  # members of a group that vote on which is kept: those with most matches; the others follow
MAX_FRESH = 10  # kept images of its group that an image is looked at with, besides those it is known to match


class Matches:
    """Verified pairs of N images, by image."""

    def __init__(self, count: int):
        self.count = count
        self.of: dict[int, dict[int, Match]] = {}

    def add(self, i: int, j: int, match: Match) -> None:
        self.of.setdefault(i, {})[j] = match
        self.of.setdefault(j, {})[i] = reversed_match(match)

    def groups(self) -> list[list[int]]:
        """Connected components of two and more images, each in order."""
        label_N = components(self.count, self.edges(self.count))
        members: dict[int, list[int]] = {}
        for row in sorted(self.of):
            members.setdefault(int(label_N[row]), []).append(row)
        return [members[label] for label in sorted(members)]

    def edges(self, count: int) -> list[Edges]:
        """The pairs among the first images, as of a search."""
        pairs = [(i, j, m.agreement) for i in sorted(self.of) for j, m in self.of[i].items() if i < j < count]
        columns = np.array(pairs).reshape(-1, 3)
        return [(columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2].astype(np.float32))]

    def count_pairs(self) -> int:
        return sum(map(len, self.of.values())) // 2

    def maps_to_one(self, rows: Sequence[int]) -> list[ndarray]:
        """The map of each of these images to the one with the most matches among them, over as few pairs as possible.

        Images that no chain of pairs among these reaches keep their own places.
        """
        inside = set(rows)
        centre = max(rows, key=lambda row: (len(inside.intersection(self.of[row])), -row))
        maps, waiting = {centre: np.eye(3)}, deque([centre])
        while waiting:
            near = waiting.popleft()
            for other in sorted(inside.intersection(self.of[near]) - maps.keys()):
                maps[other] = maps[near] @ self.of[other][near].map_33
                waiting.append(other)
        return [maps.get(row, np.eye(3)) for row in rows]


def reversed_match(match: Match) -> Match:
    """The same match from the other image."""
    return Match(np.linalg.inv(match.map_33), match.points, match.agreement, match.overlap[::-1], match.doubt)


def resolve(
    matches: Matches,
    traits: Callable[[Sequence[int]], list[keeper.Traits]],
    verify: Callable[[int, int, ndarray], Match | None],
    protected_N: ndarray,
) -> Verdict:
    """Choose the images kept of each group, and the cause of each dropped one.

    `traits` are those of images; `verify` looks at two of them, given a map. `protected_N` (bool) images are kept.
    """
    count = matches.count
    cause_N, group_N = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    score_N, reason_N = np.full(count, np.nan, np.float32), np.full(count, "", object)
    for rows in matches.groups():
        order, reasons, maps = _rank(matches, rows, traits)
        kept: list[int] = []
        for row in order:
            near = {*kept[:MAX_FRESH], *(k for k in matches.of[row] if k in kept)}
            causes = {k: match for k in sorted(near) if (match := _match(matches, verify, maps, row, k)) is not None}
            if protected_N[row] or not causes:
                kept.append(row)
                continue
            # Among the kept ones, those that are protected come first, then the one it resembles most.
            cause = max(causes, key=lambda k: (protected_N[k], causes[k].agreement, -order.index(k)))
            cause_N[row], score_N[row] = cause, causes[cause].agreement
            reason_N[row] = reasons[row] if cause == order[0] else "which stays in the same group"
            group_N[row] = group_N[cause] = cause
    return Verdict(cause_N, score_N, group_N, reason_N)


def _rank(
    matches: Matches, rows: list[int], traits: Callable[[Sequence[int]], list[keeper.Traits]]
) -> tuple[list[int], dict[int, str], dict[int, ndarray]]:
    """The order in which these images are kept, why the first is better than each, and the map of each to one place."""
    maps = dict(zip(rows, matches.maps_to_one(rows)))
    voting = rows
    if len(rows) > MAX_RANKED:
        voting = sorted(sorted(rows, key=lambda row: (-len(matches.of[row]), row))[:MAX_RANKED])
    order, reasons = keeper.rank(traits(voting), [maps[row] for row in voting])
    ranked = [voting[member] for member in order]
    why = {row: reason for row, reason in zip(voting, reasons)}
    rest = [row for row in rows if row not in why]
    return ranked + rest, why | dict.fromkeys(rest, "which most resemble"), maps


def _match(
    matches: Matches, verify: Callable[[int, int, ndarray], Match | None], maps: dict[int, ndarray], row: int, kept: int
) -> Match | None:
    if (match := matches.of[row].get(kept)) is not None:
        return match
    match = verify(row, kept, np.linalg.inv(maps[kept]) @ maps[row])
    if match is not None:
        matches.add(row, kept, match)
    return match
