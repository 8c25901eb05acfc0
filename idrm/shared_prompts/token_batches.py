"""Micro-batches of as many packed pairs as fit in a budget of tokens, and the order in which they are trained on."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.utils.data import RandomSampler, Sampler

from idrm.errors import InputError


@dataclass(frozen=True)
class TokenBatches:
    """The pairs of a data set in micro-batches, formed once: epochs differ in their order and not in their number.

    Attributes:
        batches: the indices of each one's pairs; every pair is in one of them.
        tokens_per_batch: the most tokens of one, in the row that `pack_pairs` makes of it.
        tokens: of all of them together.
    """

    batches: tuple[tuple[int, ...], ...]
    tokens_per_batch: int
    tokens: int

    @classmethod
    def form(cls, pair_tokens: Sequence[int], tokens_per_batch: int, seed: int) -> TokenBatches:
        """Takes pairs in a random order, each into the last batch or, where it does not fit there, into a new one.

        Args:
            pair_tokens: what each pair takes in the row (`packed_length`).
            seed: of the random order.

        Raises:
            InputError: a pair does not fit in a batch of its own.
        """
        too_long = [index for index, tokens in enumerate(pair_tokens) if tokens > tokens_per_batch]
        if too_long:
            longest = max(too_long, key=pair_tokens.__getitem__)
            raise InputError(
                f"--tokens_per_batch {tokens_per_batch}: training pair {longest + 1}, counted without those dropped, "
                f"takes {pair_tokens[longest]} tokens, the most of {len(too_long)} that do not fit; give at least "
                f"{pair_tokens[longest]}, or a lower --max_length"
            )
        batches: list[list[int]] = []
        free = 0
        for index in torch.randperm(len(pair_tokens), generator=torch.Generator().manual_seed(seed)).tolist():
            if not batches or pair_tokens[index] > free:
                batches.append([])
                free = tokens_per_batch
            batches[-1].append(index)
            free -= pair_tokens[index]
        return cls(tuple(map(tuple, batches)), tokens_per_batch, sum(pair_tokens))

    @functools.cached_property
    def mean_pairs(self) -> float:
        """Pairs a micro-batch."""
        return sum(map(len, self.batches)) / len(self.batches)

    def summary(self) -> str:
        """One line for the log."""
        pairs = [len(batch) for batch in self.batches]
        fill = self.tokens / (len(pairs) * self.tokens_per_batch)
        return (
            f"micro-batches of up to {self.tokens_per_batch:,} tokens: {len(pairs):,} an epoch, of {min(pairs)} to "
            f"{max(pairs)} pairs, {self.mean_pairs:.1f} in the mean, {fill:.0%} full"
        )


class TokenBatchSampler(Sampler[tuple[int, ...]]):
    """Every micro-batch once an epoch, and the first ones of the epoch again until all ranks have as many.

    A ``batch_sampler`` without ``batch_size`` and ``drop_last``, of a length that the ranks divide: accelerate's
    BatchSamplerShard deals such batches out whole, and neither fills nor drops any. It finds ``sampler`` where ordinary
    batch samplers have theirs and seeds it as theirs, by run and epoch, on every rank and in a resumed run alike.
    """

    def __init__(self, batches: Sequence[tuple[int, ...]], num_replicas: int):
        self.batches = batches
        self.num_replicas = num_replicas
        self.sampler = RandomSampler(batches)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        # Not before the first batch is asked for: a loader with workers begins twice, and the order counts its epochs.
        for index in islice(cycle(self.sampler), len(self)):
            yield self.batches[index]

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.num_replicas) * self.num_replicas
