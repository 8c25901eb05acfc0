"""The tile plan of a batch: what every program of a fused kernel works on, counted once on the host, without padding.

No tile crosses a segment, so that what a tile contains follows from its example alone:

* row tiles: 64 or 128 consecutive tokens from the segment's first on;
* column tiles: the same, of the keys; the columns of a workspace row are the example's tokens, every segment's first
  one at a multiple of COLUMN_ALIGNMENT;
* runs: whole units of at most RUN_TOKENS tokens together; a longer unit is cut in pieces of RUN_TOKENS, each a run. A
  *slot* is the row of a run that a unit's tokens are summed in: one a unit, or one a piece of a long unit;
* unit tiles: UNIT_TILE consecutive units.

A plan is one int64 vector: a header with the first and last bounds of every section, then the sections. Addresses count
elements of one head group in a workspace that would hold the whole batch; a kernel subtracts where its slab begins.
"""

from __future__ import annotations

import enum
import itertools

import torch
from torch import Tensor

TILE_SIZES = (64, 128)
RUN_TOKENS = 64
COLUMN_ALIGNMENT = 128
UNIT_TILE = 16


class Section(enum.IntEnum):
    """The sections of a plan; each a matrix, row-major."""

    SEGMENTS = 0  # (num_segments, len(SegmentField))
    EXAMPLES = 1  # (num_examples + 1, len(ExampleField))
    ROWS_64 = 2  # (tiles, 3): segment, first token, token after the last
    ROWS_128 = 3
    TEACHER_ROWS_64 = 4
    TEACHER_ROWS_128 = 5
    RUNS = 6  # (runs, 4): segment, first token, token after the last, first slot
    TEACHER_RUNS = 7
    UNITS = 8  # (total_tokens,): the unit of every student token
    TEACHER_UNITS = 9
    SLOTS = 10  # (total_units + 1,): the first slot of every unit
    TEACHER_SLOTS = 11
    UNIT_TILES = 12  # (tiles, 3): segment, first unit, unit after the last


class SegmentField(enum.IntEnum):
    """The columns of Section.SEGMENTS. A unit row begins at ORIGIN + (unit - FIRST_UNIT) * WIDTH."""

    FIRST_TOKEN = 0
    LAST_TOKEN = 1  # the one after the last, here and below
    TEACHER_FIRST_TOKEN = 2
    TEACHER_LAST_TOKEN = 3
    FIRST_UNIT = 4
    LAST_UNIT = 5
    COLUMN = 6  # of the segment's first token in its example's rows
    TEACHER_COLUMN = 7
    WIDTH = 8  # columns of the example, aligned
    TEACHER_WIDTH = 9
    ORIGIN = 10
    SLOT_ORIGIN = 11  # as ORIGIN, of the rows that are counted by slot
    TEACHER_SLOT_ORIGIN = 12


class ExampleField(enum.IntEnum):
    """The columns of Section.EXAMPLES: how many tiles, or pairs of row and column tile, all examples before have."""

    ROWS_64 = 0
    ROWS_128 = 1
    RUNS = 2
    TEACHER_RUNS = 3
    PAIRS_64_64 = 4  # rows, columns
    PAIRS_64_128 = 5
    PAIRS_128_64 = 6
    PAIRS_128_128 = 7
    RUN_PAIRS_64 = 8
    RUN_PAIRS_128 = 9
    TEACHER_RUN_PAIRS_64 = 10
    TEACHER_RUN_PAIRS_128 = 11


def make_plan(segments: int, cu_units: Tensor, unit_offsets: Tensor, teacher_unit_offsets: Tensor) -> Tensor:
    """The plan of a batch from the counts of its MapLayout, all on the host."""
    first_unit, last_unit = cu_units[:-1], cu_units[1:]
    units = last_unit - first_unit
    sides = [Side(offsets, first_unit, last_unit) for offsets in (unit_offsets, teacher_unit_offsets)]
    columns, widths, slot_origins = [], [], []
    for side in sides:
        aligned = _tile_counts(side.tokens, COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
        by_example = aligned.view(-1, segments)
        columns.append((by_example.cumsum(1) - by_example).flatten())
        widths.append(by_example.sum(1).repeat_interleave(segments))
        slot_origins.append(_before(side.slots_of_segments * widths[-1]))
    table = torch.stack(
        [
            *(bound for side in sides for bound in (side.first, side.last)),
            first_unit,
            last_unit,
            *columns,
            *widths,
            _before(units * widths[0]),
            *slot_origins,
        ],
        dim=1,
    )
    counts = [sides[0].tile_counts[64], sides[0].tile_counts[128], *(side.run_counts for side in sides)]
    column_counts = [[side.tile_counts[size].view(-1, segments).sum(1) for size in TILE_SIZES] for side in sides]
    counts = [count.view(-1, segments).sum(1) for count in counts]
    student_64, student_128, runs, teacher_runs = counts
    pairs = [rows * keys for rows in (student_64, student_128, runs) for keys in column_counts[0]]
    pairs += [teacher_runs * keys for keys in column_counts[1]]
    examples = torch.nn.functional.pad(torch.stack([*counts, *pairs], dim=1).cumsum(0), (0, 0, 1, 0))
    sections = [table, examples, *(side.tiles(size) for side in sides for size in TILE_SIZES)]
    sections += [side.runs for side in sides] + [side.unit_of_token for side in sides] + [side.slots for side in sides]
    sections.append(_tiles(first_unit, last_unit, UNIT_TILE))
    # Sections begin at even places, 16 bytes apart: kernels are compiled again for a pointer that is less aligned.
    header = 2 * len(sections)
    padded = [torch.nn.functional.pad(section.flatten(), (0, section.numel() % 2)) for section in sections]
    starts = list(itertools.accumulate((section.numel() for section in padded), initial=header))
    stops = [start + section.numel() for start, section in zip(starts, sections, strict=False)]
    bounds = torch.tensor([starts[: len(sections)], stops]).T.flatten()
    return torch.cat([bounds, *padded])


class Side:
    """The tiles of one side's tokens."""

    def __init__(self, offsets: Tensor, first_unit: Tensor, last_unit: Tensor):
        self.first, self.last = offsets[first_unit], offsets[last_unit]
        self.tokens = self.last - self.first
        self.tile_counts = {size: _tile_counts(self.tokens, size) for size in TILE_SIZES}
        sizes = offsets.diff()
        self.unit_of_token = torch.repeat_interleave(sizes)
        self.slots = torch.nn.functional.pad(_tile_counts(sizes, RUN_TOKENS).cumsum(0), (1, 0))
        self.slots_of_segments = self.slots[last_unit] - self.slots[first_unit]
        if len(self.unit_of_token) == len(sizes):
            tiles = self.tiles(RUN_TOKENS)
            self.runs = torch.cat([tiles, tiles[:, 1:2]], dim=1)
            self.run_counts = self.tile_counts[RUN_TOKENS]
        else:
            runs = list(_runs(offsets, first_unit.tolist(), last_unit.tolist(), self.slots.tolist()))
            self.runs = torch.tensor(runs, dtype=torch.int64).view(-1, 4)
            self.run_counts = torch.bincount(self.runs[:, 0], minlength=len(first_unit))

    def tiles(self, size: int) -> Tensor:
        """(tiles, 3): segment, first token, token after the last."""
        return _tiles(self.first, self.last, size)


def _runs(offsets: Tensor, first_units: list[int], last_units: list[int], slots: list[int]):
    # For every unit the one that a run from it on cannot take any more.
    ends = (torch.searchsorted(offsets, offsets[:-1] + RUN_TOKENS, right=True) - 1).tolist()
    starts = offsets.tolist()
    for segment, (unit, stop) in enumerate(zip(first_units, last_units, strict=True)):
        while unit < stop:
            after = min(max(ends[unit], unit + 1), stop)
            for piece, first in enumerate(range(starts[unit], starts[after], RUN_TOKENS)):
                yield segment, first, min(first + RUN_TOKENS, starts[after]), slots[unit] + piece
            unit = after


def _tiles(first: Tensor, last: Tensor, size: int) -> Tensor:
    counts = _tile_counts(last - first, size)
    segment = torch.repeat_interleave(counts)
    starts = first[segment] + (torch.arange(len(segment)) - _before(counts)[segment]) * size
    return torch.stack([segment, starts, torch.minimum(starts + size, last[segment])], dim=1)


def _tile_counts(tokens: Tensor, size: int) -> Tensor:
    return (tokens + size - 1) // size


def _before(counts: Tensor) -> Tensor:
    """The sum of all entries before each."""
    return counts.cumsum(0) - counts
