"""The tile plan of a batch: what every program of a fused kernel works on, counted once on the host, without padding.

The student's tokens lie in *ranges*: the prefix that an example's segments share, then each segment's own tokens. Where
nothing is shared the prefix is empty and a segment's own tokens are all that it has. The teacher's ranges are its
segments. No tile crosses a range, so that what a tile contains follows from its example alone:

* row tiles: 64 or 128 consecutive tokens from the range's first on;
* column tiles: the same, of the keys; the columns of a workspace row are the tokens of all segments, the prefix in
  each, every part's first one at a multiple of COLUMN_ALIGNMENT;
* runs: whole units of at most RUN_TOKENS tokens together; a longer unit is cut in pieces of RUN_TOKENS, each a run. A
  *slot* is the row of a run that a unit's tokens are summed in: one a unit, or one a piece of a long unit;
* unit tiles: UNIT_TILE consecutive units of a segment, all in the prefix or all behind it.

The rows of a workspace are in the order of the ranges; a unit of the prefix has one for every segment, one after the
other.

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
    ROWS_64 = 2  # (tiles, 3): segment (the example's first one for the prefix), first token, token after the last
    ROWS_128 = 3
    TEACHER_ROWS_64 = 4
    TEACHER_ROWS_128 = 5
    RUNS = 6  # (runs, 4): segment, first token, token after the last, first slot
    TEACHER_RUNS = 7
    UNITS = 8  # (total_tokens,): the unit of every student token, in the first segment for those of a prefix
    TEACHER_UNITS = 9
    SLOTS = 10  # (total_units + 1,): the first slot of every unit
    TEACHER_SLOTS = 11
    UNIT_TILES = 12  # (tiles, 3): segment, first unit, unit after the last


class SegmentField(enum.IntEnum):
    """The columns of Section.SEGMENTS: of a segment's own tokens, of the prefix that it shares, and of both together.

    The row of a part's unit begins at ORIGIN + (unit - PART_UNIT) * STRIDE, and PREFIX_ORIGIN and so on for the prefix.
    """

    FIRST_TOKEN = 0
    LAST_TOKEN = 1  # the one after the last, here and below
    PART_UNIT = 2  # the first unit
    COLUMN = 3  # of the first token in the example's rows
    ORIGIN = 4
    STRIDE = 5
    PREFIX_FIRST_TOKEN = 6
    PREFIX_LAST_TOKEN = 7
    PREFIX_PART_UNIT = 8
    PREFIX_COLUMN = 9
    PREFIX_ORIGIN = 10
    PREFIX_STRIDE = 11
    TEACHER_FIRST_TOKEN = 12
    TEACHER_LAST_TOKEN = 13
    FIRST_UNIT = 14
    LAST_UNIT = 15
    TEACHER_COLUMN = 16
    WIDTH = 17  # columns of the example, aligned
    TEACHER_WIDTH = 18
    SLOT_ORIGIN = 19  # the row of the first unit's first slot, of the rows that are counted by slot
    TEACHER_SLOT_ORIGIN = 20


# From a field of a segment's own tokens to that of its prefix.
PREFIX = SegmentField.PREFIX_FIRST_TOKEN - SegmentField.FIRST_TOKEN


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


def make_plan(
    segments: int, cu_units: Tensor, unit_offsets: Tensor, teacher_unit_offsets: Tensor, shared_units: Tensor
) -> Tensor:
    """The plan of a batch from the counts of its MapLayout, all on the host."""
    first_unit, last_unit = cu_units[:-1], cu_units[1:]
    units = (last_unit - first_unit).view(-1, segments)
    segment = torch.arange(len(first_unit))
    shared = shared_units[:, None]
    own_unit = first_unit + shared_units.repeat_interleave(segments)
    # Ranges and parts: an example's first segment stands for all of them where they share.
    by_range = [
        torch.cat([first[:, :1], own], dim=1).flatten()
        for first, own in (
            (segment.view(-1, segments), segment.view(-1, segments)),
            (first_unit.view(-1, segments), own_unit.view(-1, segments)),
            (own_unit.view(-1, segments), last_unit.view(-1, segments)),
        )
    ]
    student = Side(unit_offsets, segments + 1, *by_range)
    teacher = Side(teacher_unit_offsets, segments, segment, first_unit, last_unit)
    sides = (student, teacher)
    prefix_columns, own_columns = student.by_example(student.aligned).split([1, segments], dim=1)
    columns = prefix_columns + own_columns
    teacher_columns = teacher.by_example(teacher.aligned)
    widths = [own.sum(1, keepdim=True) for own in (columns, teacher_columns)]
    example_origin = _before((units * widths[0]).sum(1))[:, None]
    own_units = units - shared
    prefix_column = _before(columns, dim=1)
    parts = {
        "": (
            *(student.by_example(bound)[:, 1:] for bound in (student.first, student.last)),
            own_unit.view(-1, segments),
            prefix_column + prefix_columns,
            example_origin + (shared * segments + _before(own_units, dim=1)) * widths[0],
            widths[0].expand_as(units),
        ),
        "PREFIX_": (
            *(student.by_example(bound)[:, :1].expand_as(units) for bound in (student.first, student.last)),
            first_unit.view(-1, segments),
            prefix_column,
            example_origin + torch.arange(segments) * widths[0],
            (widths[0] * segments).expand_as(units),
        ),
    }
    names = ("FIRST_TOKEN", "LAST_TOKEN", "PART_UNIT", "COLUMN", "ORIGIN", "STRIDE")
    # A prefix's units have the slots of the first segment's.
    unit_segment = torch.repeat_interleave(units.flatten())
    place = torch.arange(len(unit_segment)) - first_unit[unit_segment]
    example = unit_segment // segments
    held = torch.where(place < shared_units[example], first_unit[example * segments], first_unit[unit_segment]) + place
    slots = [student.slots_of(held), teacher.slots_of(torch.arange(len(held)))]
    slot_origins = []
    for side, own, width in zip(sides, slots, widths, strict=True):
        first_slots = own[first_unit].view(-1, segments)
        origins = _before(side.by_example(side.slot_counts).sum(1) * width.flatten())[:, None]
        slot_origins.append(origins + (first_slots - first_slots[:, :1]) * width)
    fields = {prefix + name: value for prefix, part in parts.items() for name, value in zip(names, part, strict=True)}
    fields.update(
        TEACHER_FIRST_TOKEN=teacher.first,
        TEACHER_LAST_TOKEN=teacher.last,
        FIRST_UNIT=first_unit,
        LAST_UNIT=last_unit,
        TEACHER_COLUMN=_before(teacher_columns, dim=1),
        WIDTH=widths[0].expand_as(units),
        TEACHER_WIDTH=widths[1].expand_as(units),
        SLOT_ORIGIN=slot_origins[0],
        TEACHER_SLOT_ORIGIN=slot_origins[1],
    )
    table = torch.stack([fields[field.name].flatten() for field in SegmentField], dim=1)
    counts = [student.by_example(student.tile_counts[size]).sum(1) for size in TILE_SIZES]
    counts += [side.by_example(side.run_counts).sum(1) for side in sides]
    column_counts = [[side.by_example(side.tile_counts[size]).sum(1) for size in TILE_SIZES] for side in sides]
    student_64, student_128, runs, teacher_runs = counts
    pairs = [rows * keys for rows in (student_64, student_128, runs) for keys in column_counts[0]]
    pairs += [teacher_runs * keys for keys in column_counts[1]]
    examples = torch.nn.functional.pad(torch.stack([*counts, *pairs], dim=1).cumsum(0), (0, 0, 1, 0))
    sections = [table, examples, *(side.tiles(size) for side in sides for size in TILE_SIZES)]
    sections += [side.runs for side in sides] + [side.unit_of_token for side in sides] + slots
    unit_parts = [torch.stack(bounds, dim=1).flatten() for bounds in ((first_unit, own_unit), (own_unit, last_unit))]
    sections.append(_tiles(segment.repeat_interleave(2), *unit_parts, UNIT_TILE))
    # Sections begin at even places, 16 bytes apart: kernels are compiled again for a pointer that is less aligned.
    header = 2 * len(sections)
    padded = [torch.nn.functional.pad(section.flatten(), (0, section.numel() % 2)) for section in sections]
    starts = list(itertools.accumulate((section.numel() for section in padded), initial=header))
    stops = [start + section.numel() for start, section in zip(starts, sections, strict=False)]
    bounds = torch.tensor([starts[: len(sections)], stops]).T.flatten()
    return torch.cat([bounds, *padded])


class Side:
    """The tiles of one side's tokens, which lie range after range; each is some units of a segment."""

    def __init__(self, offsets: Tensor, ranges: int, segment: Tensor, first_unit: Tensor, last_unit: Tensor):
        self.ranges_per_example, self.segment = ranges, segment
        counts = last_unit - first_unit
        self.units = _consecutive(first_unit, counts)
        sizes = offsets.diff()[self.units]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.first, self.last = offsets[bounds[:-1]], offsets[bounds[1:]]
        tokens = self.last - self.first
        self.tile_counts = {size: _tile_counts(tokens, size) for size in TILE_SIZES}
        self.aligned = _tile_counts(tokens, COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
        self.unit_of_token = self.units.repeat_interleave(sizes)
        self.slots = torch.nn.functional.pad(_tile_counts(sizes, RUN_TOKENS).cumsum(0), (1, 0))
        self.slot_counts = self.slots[bounds[1:]] - self.slots[bounds[:-1]]
        if len(self.unit_of_token) == len(sizes):
            tiles = self.tiles(RUN_TOKENS)
            self.runs = torch.cat([tiles, tiles[:, 1:2]], dim=1)
            self.run_counts = self.tile_counts[RUN_TOKENS]
        else:
            runs = list(_runs(offsets, bounds[:-1].tolist(), bounds[1:].tolist(), self.slots.tolist()))
            self.runs = torch.tensor(runs, dtype=torch.int64).view(-1, 4)
            self.run_counts = torch.bincount(self.runs[:, 0], minlength=len(first_unit))
            self.runs[:, 0] = segment[self.runs[:, 0]]

    def tiles(self, size: int) -> Tensor:
        """(tiles, 3): segment, first token, token after the last."""
        return _tiles(self.segment, self.first, self.last, size)

    def by_example(self, values: Tensor) -> Tensor:
        """(num_examples, ranges of an example): the values of the ranges."""
        return values.view(-1, self.ranges_per_example)

    def slots_of(self, units: Tensor) -> Tensor:
        """The first slots of some of this side's units, and after them the number of all slots."""
        place = torch.empty_like(units)
        place[self.units] = torch.arange(len(self.units))
        return torch.cat([self.slots[place[units]], self.slots[-1:]])


def _runs(offsets: Tensor, first_units: list[int], last_units: list[int], slots: list[int]):
    # For every unit the one that a run from it on cannot take any more.
    ends = (torch.searchsorted(offsets, offsets[:-1] + RUN_TOKENS, right=True) - 1).tolist()
    starts = offsets.tolist()
    for index, (unit, stop) in enumerate(zip(first_units, last_units, strict=True)):
        while unit < stop:
            after = min(max(ends[unit], unit + 1), stop)
            for piece, first in enumerate(range(starts[unit], starts[after], RUN_TOKENS)):
                yield index, first, min(first + RUN_TOKENS, starts[after]), slots[unit] + piece
            unit = after


def _tiles(segment: Tensor, first: Tensor, last: Tensor, size: int) -> Tensor:
    counts = _tile_counts(last - first, size)
    index = torch.repeat_interleave(counts)
    starts = first[index] + (torch.arange(len(index)) - _before(counts)[index]) * size
    return torch.stack([segment[index], starts, torch.minimum(starts + size, last[index])], dim=1)


def _consecutive(first: Tensor, counts: Tensor) -> Tensor:
    """For every entry its first number and those after it, so many as it counts."""
    index = torch.repeat_interleave(counts)
    return (first - _before(counts))[index] + torch.arange(len(index))


def _tile_counts(tokens: Tensor, size: int) -> Tensor:
    return (tokens + size - 1) // size


def _before(counts: Tensor, dim: int = 0) -> Tensor:
    """The sum of all entries before each."""
    return counts.cumsum(dim) - counts
