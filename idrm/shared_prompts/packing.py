"""The layout of pairs in one row: each pair's common beginning, then what is chosen's own, then what is rejected's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor


class PackedPair(NamedTuple):
    """Where one pair stands in the row.

    Attributes:
        start: its first token.
        shared: tokens that both sequences begin with, the longest common prefix.
        chosen, rejected: tokens after it that are a sequence's own; either may have none.
    """

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        return self.start + self.shared + self.chosen + self.rejected

    def place(self, segment: int, position: int) -> int:
        """Where a token of a sequence, 0 chosen and 1 rejected, stands in the row."""
        skipped = self.chosen if segment and position >= self.shared else 0
        return self.start + position + skipped


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """B pairs in one row without padding; the parts of one attend to themselves and to what they share alone.

    Attributes:
        pairs: where each stands.
        input_ids: (1, tokens) int64.
        position_ids: (1, tokens) int64: each sequence is at its own positions, as if it had a row to itself.
        sequence_ends: (2B,) int64, the last token of each sequence, those of chosen first.
    """

    pairs: tuple[PackedPair, ...]
    input_ids: Tensor
    position_ids: Tensor
    sequence_ends: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedPairs:
        """The same pairs on another device."""
        tensors = (self.input_ids, self.position_ids, self.sequence_ends)
        return PackedPairs(self.pairs, *(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def pin_memory(self) -> PackedPairs:
        """The same pairs in page-locked memory."""
        tensors = (self.input_ids, self.position_ids, self.sequence_ends)
        return PackedPairs(self.pairs, *(tensor.pin_memory() for tensor in tensors))

    @functools.cached_property
    def rejected_masks(self) -> tuple[Tensor | None, ...]:
        """For each pair which keys of [shared, rejected's own] its rejected rows see: (1, 1, rows, keys) bool.

        None where there are no such rows, or where the rows begin with the keys: that is plain causal attention.
        """
        return tuple(
            torch.ones(pair.rejected, pair.shared + pair.rejected, dtype=torch.bool, device=self.input_ids.device).tril(
                pair.shared
            )[None, None]
            if pair.rejected and pair.shared
            else None
            for pair in self.pairs
        )


def pack_pairs(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> PackedPairs:
    """Lays out B pairs of token ids, none of them empty."""
    pairs, ids, positions = [], [], []
    ends: list[list[int]] = [[], []]
    for first, second in zip(chosen, rejected, strict=True):
        shared = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], zip(first, second, strict=False)))
        pair = PackedPair(len(ids), shared, len(first) - shared, len(second) - shared)
        ids += [*first, *second[shared:]]
        positions += [*range(len(first)), *range(shared, len(second))]
        for segment, sequence in enumerate((first, second)):
            ends[segment].append(pair.place(segment, len(sequence) - 1))
        pairs.append(pair)
    return PackedPairs(tuple(pairs), torch.tensor([ids]), torch.tensor([positions]), torch.tensor(ends[0] + ends[1]))
