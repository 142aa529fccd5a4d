"""Which image comes when: an endless shuffled stream as a function of a position, with nothing to remember."""

from collections.abc import Sequence
from fractions import Fraction

from troodon.config import UsageError


def permute(position: int, length: int, key: int) -> int:
    """Where `position` goes in the permutation of range(length) that `key` names: a shuffle in constant memory.

    A Feistel network on the next power of four, walked until it lands inside (Black and Rogaway, 2002).
    """
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + turn * 0x94D049BB133111EB) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        position = (left << half) | right
        if position < length:
            return position


def assign_source(position: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """Which source a position of the stream is dealt to, and which of that source's images it is.

    Spread as evenly as whole numbers can be: among the first n positions, a source with the share s of the weights that
    are left to it and those after it has the whole part of n s. Exact, and without a state.
    """
    if not weights:
        return 0, position
    exact = [Fraction(str(weight)) for weight in weights]
    for source, weight in enumerate(exact):
        left = sum(exact[source:])
        before = position * weight // left
        if (position + 1) * weight // left > before:
            return source, int(before)
        position -= int(before)
    raise AssertionError(weights)


def check_weights(weights: Sequence[float], parts: Sequence[int]) -> None:
    """UsageError unless there is one weight, above 0, for every source; `parts` are the images of each."""
    if not weights:
        return
    if len(weights) != len(parts):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise UsageError(f"weights {given}: data names {len(parts)} sources, so give {len(parts)} weights, or none")
    for weight, part in zip(weights, parts):
        if not 0 < weight < float("inf"):
            raise UsageError(f"weights {weight:g}: must be above 0; leave out a source that is not wanted")
        if not part:
            raise UsageError("weights: a source has no images of its own; all of them lie in one before it")
