"""Sequences with a common beginning, two by two, so that a model that reads packed pairs reads it once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from idrm.shared_prompts.packing import common_prefix


@dataclass(frozen=True)
class Neighbours:
    """Two sequences of ids, and how many ids at their beginning are the same.

    Its length is the number of tokens to be read.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    shared: int

    def __len__(self) -> int:
        return len(self.first) + len(self.second) - self.shared


def neighbours(sequences: Iterable[tuple[int, ...]], most_tokens: int | None = None) -> list[Neighbours]:
    """Pairs of distinct sequences, each beside the one that it has most in common with, as far as that one is free.

    Those are left out that have nothing in common with a free one, or with it more than `most_tokens` to be read.
    """
    ordered = sorted(set(sequences))
    common = [common_prefix(first, second) for first, second in pairwise(ordered)]
    pairs, index = [], 0
    while index < len(common):
        following = common[index + 1] if index + 1 < len(common) else 0
        pair = Neighbours(ordered[index], ordered[index + 1], common[index])
        # The next one may have more in common with the one after it.
        if pair.shared >= max(following, 1) and (most_tokens is None or len(pair) <= most_tokens):
            pairs.append(pair)
            index += 1
        index += 1
    return pairs
