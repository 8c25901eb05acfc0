"""How a pair that is too long for one teacher input is read: in windows, each holding a stretch of both segments.

Windows are as long as the teacher can read, share out the room in proportion to the segments' lengths, overlap by a
quarter, and are spread evenly, so that the first begins where both texts begin and the last ends where both end. Every
token belongs to one window, the one in which it stands farthest from an edge that is none of its text.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# The least part of a window that the shorter segment gets, where it has as much, and what neighbours share.
SMALLEST_SHARE = 4
OVERLAP = 4


@dataclass(frozen=True)
class Windows:
    """The stretches of one segment, one a window.

    Attributes:
        starts: its first token in each window, not falling.
        size: tokens of it in a window, the same in all.
    """

    starts: list[int]
    size: int

    def stretch(self, window: int) -> slice:
        """The segment's tokens in a window."""
        return slice(self.starts[window], self.starts[window] + self.size)

    def owners(self) -> list[int]:
        """For every token of the segment the window that it belongs to; the last one that holds all of it, if any."""
        if self.starts[0] == self.starts[-1]:
            return [len(self.starts) - 1] * self.size
        borders = [(start + self.size + following) / 2 for start, following in pairwise(self.starts)]
        return [bisect_right(borders, token) for token in range(self.starts[-1] + self.size)]


def divide_into_windows(lengths: Sequence[int], limit: int) -> tuple[Windows, Windows]:
    """The windows of two segments of these lengths, in tokens, of which one input holds at most `limit` together."""
    total = sum(lengths)
    if total <= limit:
        return Windows([0], lengths[0]), Windows([0], lengths[1])
    least = [min(length, limit // SMALLEST_SHARE) for length in lengths]
    chosen = min(max(limit * lengths[0] // total, least[0]), limit - least[1])
    sizes = (chosen, limit - chosen)
    count = max(
        1 + -(-(length - size) // (size - size // OVERLAP)) if length > size else 1
        for length, size in zip(lengths, sizes, strict=True)
    )
    chosen_windows, rejected_windows = (
        Windows([window * (length - size) // (count - 1) for window in range(count)], size)
        for length, size in zip(lengths, sizes, strict=True)
    )
    return chosen_windows, rejected_windows
