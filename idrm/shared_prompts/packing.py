"""The layout of pairs in one row: each pair's common beginning, then what is chosen's own, then what is rejected's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

# Of a call's scores: how many times those that are needed, and how many more in any case, for a call has its own cost.
MOST_PADDING, FREE_PADDING = 1.3, 1 << 16


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
    def attention_calls(self) -> tuple[AttentionCall, ...]:
        """What is computed for the row's attention, part by part; every token is a row of one call."""
        return tuple(_call(group, self.input_ids.device) for parts in self._parts for group in _groups(parts))

    @functools.cached_property
    def variable_lengths(self) -> VariableLengths:
        """The same as sequences of different lengths in one call, for flash attention."""
        return VariableLengths.of([part for parts in self._parts for part in parts], self.input_ids.device)

    @property
    def _parts(self) -> tuple[list[_Part], list[_Part]]:
        """Of all pairs what is shared with chosen's own, and then the rows that are rejected's own."""
        chosen = [_Part(pair.start, 0, pair.shared + pair.chosen, 0) for pair in self.pairs]
        # They come after what is shared, between which chosen's own stand.
        rejected = [_Part(pair.start, pair.shared, pair.rejected, pair.chosen) for pair in self.pairs]
        return [part for part in chosen if part.rows], [part for part in rejected if part.rows]

    @functools.cached_property
    def restored(self) -> Tensor:
        """(tokens,) int64: where each token of the row stands among the rows of all calls, one call behind another."""
        rows = torch.cat([call.rows.flatten() for call in self.attention_calls])
        is_row = torch.cat([call.is_row.flatten() for call in self.attention_calls])
        restored = torch.empty(self.input_ids.shape[1], dtype=torch.int64, device=rows.device)
        return restored.scatter_(0, rows[is_row], is_row.nonzero().flatten())


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One batch of parts of the row, each of which attends to itself and to what stands before it in its sequence.

    Attributes:
        rows: (parts, longest) int64, tokens whose attention is computed; some that stand for padding at the end.
        is_row: (parts, longest) bool, those that do not.
        keys: (parts, longest sequence) int64, tokens of the sequences, likewise padded.
        mask: (parts, 1, longest, longest sequence) bool, which keys each row sees; None where rows are the keys, and
            that is plain causal attention, in which no row sees the padding behind it.
    """

    rows: Tensor
    is_row: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class VariableLengths:
    """The parts of the row one behind another, each the last rows of its sequence: causal, aligned at the end.

    Attributes:
        rows: (tokens,) int64, the tokens whose attention is computed, each of the row's once.
        keys: (keys,) int64, the tokens of every part's sequence; those that are shared stand there twice.
        restored: (tokens,) int64, where each token of the row stands among ``rows``.
        arguments: cu_seq_lens_q and cu_seq_lens_k (parts + 1,) int32, max_length_q and max_length_k, as transformers
            hands them to flash attention.
    """

    rows: Tensor
    keys: Tensor
    restored: Tensor
    arguments: dict[str, Tensor | int]

    @classmethod
    def of(cls, parts: Sequence[_Part], device: torch.device) -> VariableLengths:
        """For some parts that hold every token of the row once."""
        own = [torch.arange(part.rows) + part.start + part.before + part.skipped for part in parts]
        before = [torch.arange(part.before) + part.start for part in parts]
        rows = torch.cat(own)
        keys = torch.cat([tokens for both in zip(before, own, strict=True) for tokens in both])
        lengths = {"q": [part.rows for part in parts], "k": [part.before + part.rows for part in parts]}
        arguments: dict[str, Tensor | int] = {}
        for side, counts in lengths.items():
            cumulative = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
            arguments |= {f"cu_seq_lens_{side}": cumulative.to(device), f"max_length_{side}": max(counts)}
        return cls(rows.to(device), keys.to(device), rows.argsort().to(device), arguments)


class _Part(NamedTuple):
    """Rows of one sequence.

    Attributes:
        start: of the pair.
        before: tokens of the sequence before its rows, which stand at the pair's start.
        rows: how many.
        skipped: tokens between those before and the rows, which are not the sequence's.
    """

    start: int
    before: int
    rows: int
    skipped: int

    @property
    def scores(self) -> int:
        return self.rows * (self.before + self.rows)


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Parts of about one size together: one call for all that padding does not make much more work of."""
    group: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.before + part.rows, part.rows)):
        grown = [*group, part]
        rows, keys = max(part.rows for part in grown), part.before + part.rows
        padded, needed = len(grown) * rows * keys, sum(part.scores for part in grown)
        if group and padded > MOST_PADDING * needed and padded - needed > FREE_PADDING:
            yield group
            grown = [part]
        group = grown
    if group:
        yield group


def _call(parts: Sequence[_Part], device: torch.device) -> AttentionCall:
    start, before, count, skipped = (
        torch.tensor(column, device=device)[:, None] for column in zip(*parts, strict=True)
    )
    row = torch.arange(max(part.rows for part in parts), device=device)[None]
    key = torch.arange(max(part.before + part.rows for part in parts), device=device)[None]
    is_row, is_key = row < count, key < before + count
    # What stands for padding is the part's first token.
    rows = torch.where(is_row, start + before + skipped + row, start)
    keys = torch.where(is_key, start + key + torch.where(key < before, 0, skipped), start)
    if not any(part.before for part in parts):
        return AttentionCall(rows, is_row, keys, None)
    return AttentionCall(rows, is_row, keys, (key[:, None] <= (before + row)[:, :, None])[:, None])


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences both begin with."""
    return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], zip(first, second, strict=False)))


def packed_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens that a pair takes in the row."""
    return len(chosen) + len(rejected) - common_prefix(chosen, rejected)


def pack_pairs(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> PackedPairs:
    """Lays out B pairs of token ids, none of them empty."""
    pairs, ids, positions = [], [], []
    ends: list[list[int]] = [[], []]
    for first, second in zip(chosen, rejected, strict=True):
        shared = common_prefix(first, second)
        pair = PackedPair(len(ids), shared, len(first) - shared, len(second) - shared)
        ids += [*first, *second[shared:]]
        positions += [*range(len(first)), *range(shared, len(second))]
        for segment, sequence in enumerate((first, second)):
            ends[segment].append(pair.place(segment, len(sequence) - 1))
        pairs.append(pair)
    return PackedPairs(tuple(pairs), torch.tensor([ids]), torch.tensor([positions]), torch.tensor(ends[0] + ends[1]))
