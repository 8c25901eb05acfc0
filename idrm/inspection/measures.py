"""What is measured on the attention maps of a pair, and its summary over pairs, as docs/teachers.md defines it.

U is the head-averaged map between units of one pair (DESIGN section 2) and u that of a uniform attention: u(b) is the
share of unit b among the tokens that the softmax runs over. Only the rows that count in training are looked at: all, or
those of the responses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# Blocks (query segment, key segment) of a pair.
_INTRA, _INTER = ((0, 0), (1, 1)), ((0, 1), (1, 0))
# Below this many roundings per entry a map counts as uniform: shares of rounding errors would say nothing.
_ROUNDINGS = 16


@dataclass(frozen=True)
class PairUnits:
    """Where the segments and responses of one pair lie among its units.

    Attributes:
        segments: the units of chosen and of rejected, counted through.
        responses: the last of them, which lie in the response.
        sizes: (units,) float64, the tokens of each unit.
        rows: "all", or "response" to look at no row of a prompt, as ``interaction_rows`` does in training.
    """

    segments: tuple[range, ...]
    responses: tuple[range, ...]
    sizes: Tensor
    rows: Literal["all", "response"] = "all"

    @classmethod
    def of(cls, encoded: Mapping[str, Any], sizes: Tensor, rows: Literal["all", "response"]) -> PairUnits:
        """Of a pair as ``PairEncoder`` gives it."""
        ends = list(itertools.accumulate(encoded["num_units"], initial=0))
        segments = tuple(range(start, stop) for start, stop in itertools.pairwise(ends))
        responses = tuple(
            range(segment.stop - length, segment.stop)
            for segment, length in zip(segments, encoded["response_units"], strict=True)
        )
        return cls(segments, responses, sizes.double(), rows)

    @property
    def rows_that_count(self) -> tuple[range, ...]:
        """Of each segment."""
        return self.segments if self.rows == "all" else self.responses


@dataclass(frozen=True)
class Crossing:
    """How much attention goes to the other sequence under joint normalisation, and how much a uniform map pays there.

    Attributes:
        share, uniform_share: means in [0, 1].
        ratio: share / uniform_share; None where a uniform map pays nothing.
    """

    share: float
    uniform_share: float

    @property
    def ratio(self) -> float | None:
        return self.share / self.uniform_share if self.uniform_share else None


@dataclass(frozen=True)
class Structure:
    """How far maps under block normalisation are from uniform ones.

    Attributes:
        distance: the loss of a uniform student, mean over pairs.
        row_specific_distance: the loss of the best student whose rows are all alike, mean over pairs.
        row_specific_share: in [0, 1], of the squares of all pairs together; 0 for uniform maps.
        moved: in [0, 1), mean over rows, then over pairs.
    """

    distance: float
    row_specific_distance: float
    row_specific_share: float
    moved: float


@dataclass(frozen=True)
class BlockMeasures:
    """The summary of one block over all pairs.

    Attributes:
        crossing: from all rows that count to the other sequence. response_crossing: from the rows of one response to
            the other response.
        intra, inter: of the blocks x = y, and x != y. responses: of the inter blocks, rows and keys of the responses
            alone, neither U nor u being normalised again.
        distance_to_first: the loss, intra and inter, that the first teacher of an inspection would have as a student of
            this one, with the block at the same distance from the end; mean over the pairs that both cut into the same
            units, None without any.
    """

    crossing: Crossing
    response_crossing: Crossing
    intra: Structure
    inter: Structure
    responses: Structure
    distance_to_first: float | None

    @classmethod
    def summary(cls, pairs: Sequence[PairMeasures]) -> BlockMeasures:
        """Means over pairs; a pair without rows in question is left out of means over rows."""
        apart = [pair.distance_to_first for pair in pairs if pair.distance_to_first is not None]
        return cls(
            crossing=_mean_crossing([pair.crossing for pair in pairs]),
            response_crossing=_mean_crossing([pair.response_crossing for pair in pairs]),
            intra=_mean_structure([pair.intra for pair in pairs]),
            inter=_mean_structure([pair.inter for pair in pairs]),
            responses=_mean_structure([pair.responses for pair in pairs]),
            distance_to_first=_mean(apart) if apart else None,
        )


@dataclass(frozen=True)
class _PairStructure:
    """Sums over the blocks of one kind of a pair; `moved` sums over its `rows`."""

    distance: float
    row_specific_distance: float
    squares: float
    row_specific_squares: float
    moved: float
    rows: int


@dataclass(frozen=True)
class PairMeasures:
    """What one pair adds to the measures of a block; a crossing is None for a pair without rows in question."""

    crossing: Crossing | None
    response_crossing: Crossing | None
    intra: _PairStructure
    inter: _PairStructure
    responses: _PairStructure
    distance_to_first: float | None

    @classmethod
    def of(cls, joint: Tensor, block: Tensor, units: PairUnits, first: Tensor | None = None) -> PairMeasures:
        """Of the maps of one pair under either normalisation, each (units, units), float32 or float64.

        ``first`` is the first teacher's map under block normalisation, of the same units.
        """
        return cls(
            crossing=_crossing(joint, units, units.rows_that_count, units.segments),
            response_crossing=_crossing(joint, units, units.responses, units.responses),
            intra=_structure(block, units, _INTRA, units.rows_that_count, units.segments),
            inter=_structure(block, units, _INTER, units.rows_that_count, units.segments),
            responses=_structure(block, units, _INTER, units.responses, units.responses),
            distance_to_first=None if first is None else _distance(block, first, units),
        )


def _crossing(joint: Tensor, units: PairUnits, rows: Sequence[range], keys: Sequence[range]) -> Crossing | None:
    """What the rows of either segment pay to the keys of the other one; None without any such rows or keys."""
    if not any(map(len, rows)) or not all(map(len, keys)):
        return None
    share = uniform_share = 0.0
    for x in range(2):
        other = keys[1 - x]
        share += _part(joint, rows[x], other).double().sum().item()
        uniform_share += len(rows[x]) * (units.sizes[other.start : other.stop].sum() / units.sizes.sum()).item()
    num_rows = sum(map(len, rows))
    return Crossing(share / num_rows, uniform_share / num_rows)


def _structure(
    block: Tensor,
    units: PairUnits,
    blocks: Sequence[tuple[int, int]],
    rows: Sequence[range],
    keys: Sequence[range],
) -> _PairStructure:
    """Of these rows and keys of some blocks (query segment, key segment)."""
    totals = torch.zeros(5, dtype=torch.float64)
    num_rows = 0
    for x, y in blocks:
        if not len(rows[x]) or not len(keys[y]):
            continue
        sizes, own_sizes = (units.sizes[part.start : part.stop] for part in (units.segments[y], keys[y]))
        uniform = (own_sizes / sizes.sum()).to(block.device)
        values = _part(block, rows[x], keys[y]).double()
        squares = (values - uniform).square().sum()
        rounding = len(rows[x]) * (_ROUNDINGS * torch.finfo(block.dtype).eps * uniform).square().sum()
        if squares > rounding:
            row_specific = (values - values.mean(0)).square().sum()
            moved = (values - uniform).abs().sum() / 2
            totals += torch.stack([squares.sqrt(), row_specific.sqrt(), squares, row_specific, moved]).cpu()
        num_rows += len(rows[x])
    return _PairStructure(*totals.tolist(), rows=num_rows)


def _distance(block: Tensor, other: Tensor, units: PairUnits) -> float:
    """Between two maps of one pair, over all four blocks."""
    squares = (block.double() - other.double()).square()
    parts = [_part(squares, units.rows_that_count[x], units.segments[y]).sum() for x, y in (*_INTRA, *_INTER)]
    return torch.stack(parts).sqrt().sum().item()


def _part(values: Tensor, rows: range, keys: range) -> Tensor:
    return values[rows.start : rows.stop, keys.start : keys.stop]


def _mean_crossing(pairs: Sequence[Crossing | None]) -> Crossing:
    measured = [pair for pair in pairs if pair is not None]
    return Crossing(
        share=_mean([pair.share for pair in measured]),
        uniform_share=_mean([pair.uniform_share for pair in measured]),
    )


def _mean_structure(pairs: Sequence[_PairStructure]) -> Structure:
    squares = sum(pair.squares for pair in pairs)
    return Structure(
        distance=_mean([pair.distance for pair in pairs]),
        row_specific_distance=_mean([pair.row_specific_distance for pair in pairs]),
        row_specific_share=sum(pair.row_specific_squares for pair in pairs) / squares if squares else 0.0,
        moved=_mean([pair.moved / pair.rows for pair in pairs if pair.rows]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
