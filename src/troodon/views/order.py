"""The order of images: an endless shuffled stream, as a function of the position, without state."""

from collections.abc import Sequence
from fractions import Fraction

from troodon.config import UsageError


def permute(position: int, length: int, key: int) -> int:
    """The image of `position` under a permutation of range(length) that `key` selects: a shuffle in constant memory.

    A Feistel network on the next power of four, repeated until the result is below `length` (cycle walking; Black and
    Rogaway, 2002).
    """
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_ in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + round_ * 0x94D049BB133111EB) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        position = (left << half) | right
        if position < length:
            return position


def assign_source(position: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """The source that a position of the stream is assigned to, and the position in the stream of that source.

    As even as integers allow: of the first n positions that are left to a source and those after it, a source with the
    share s of their weights gets floor(n s). Exact, and without state.
    """
    if not weights:
        return 0, position
    exact = [Fraction(str(weight)) for weight in weights]
    for source, weight in enumerate(exact):
        total = sum(exact[source:])
        before = position * weight // total
        if (position + 1) * weight // total > before:
            return source, int(before)
        position -= int(before)
    raise AssertionError(weights)


def check_weights(weights: Sequence[float], source_lengths: Sequence[int]) -> None:
    """Raise UsageError unless there is one weight, above 0, for every source; `source_lengths` counts their images."""
    if not weights:
        return
    if len(weights) != len(source_lengths):
        given, count = " ".join(f"{weight:g}" for weight in weights), len(source_lengths)
        raise UsageError(f"weights {given}: data names {count} sources, so give {count} weights, or none")
    for weight, length in zip(weights, source_lengths):
        if not 0 < weight < float("inf"):
            raise UsageError(f"weights {weight:g}: must be above 0; omit a source that is not wanted")
        if not length:
            raise UsageError("weights: a source has no images of its own; all of them are in a source before it")
