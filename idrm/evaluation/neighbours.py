"""Sequences with a common beginning, two by two, so that a model that reads packed pairs reads it once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Neighbours:
    """Two sequences of ids, or one, and how many ids at their beginning are the same.

    Its length is the number of tokens to be read.
    """

    sequences: tuple[tuple[int, ...], ...]
    shared: int

    def __len__(self) -> int:
        return sum(map(len, self.sequences)) - (len(self.sequences) - 1) * self.shared


def neighbours(sequences: Iterable[tuple[int, ...]]) -> list[Neighbours]:
    """Every distinct sequence once, beside the one that it has most in common with, as far as that one is free."""
    ordered = sorted(set(sequences))
    common = [_common(first, second) for first, second in pairwise(ordered)]
    pairs, index = [], 0
    while index < len(ordered):
        own, following = (common[place] if place < len(common) else 0 for place in (index, index + 1))
        # The next one may have more in common with the one after it.
        members = 2 if own and own >= following else 1
        pairs.append(Neighbours(tuple(ordered[index : index + members]), own if members == 2 else 0))
        index += members
    return pairs


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
