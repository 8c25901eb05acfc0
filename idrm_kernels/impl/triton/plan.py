"""A batch's tile plan as the launchers read it, and its cutting into slabs whose workspace stays within its bound."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from idrm_kernels.impl.problem import MapProblem
from idrm_kernels.tiles import PREFIX, TILE_SIZES, ExampleField, Section, SegmentField

# The fields that place the student's and the teacher's staged rows.
STAGED = (
    (SegmentField.SLOT_ORIGIN, SegmentField.WIDTH),
    (SegmentField.TEACHER_SLOT_ORIGIN, SegmentField.TEACHER_WIDTH),
)
# A slab begins at a multiple of this many tokens of its range, so that it cuts no tile of the key gradient's rows.
SLAB_ROWS = 64


class Slab(NamedTuple):
    """Rows whose differences are held at once.

    Attributes:
        groups, examples, segments, tokens, units: what it covers; units are all that tokens, the student's, touch, in
            the first of the segments for a prefix.
        origin, elements: its place in, and its part of, a workspace for the whole batch and one head group.
        is_shared: whether its examples share a prefix; else none of them does.
        is_whole: whether it covers every segment to its end, in all its groups' rows.
        begins, ends: whether it is the first or the last one of its examples.
    """

    groups: range
    examples: range
    segments: range
    tokens: range
    units: range
    origin: int
    elements: int
    is_shared: bool
    is_whole: bool
    begins: bool
    ends: bool


class Staging(NamedTuple):
    """Units whose rows of both maps are held at once: the tiles to compare, and where they begin.

    Attributes:
        tiles: of Section.UNIT_TILES.
        units: those of the tiles that are the slab's.
        slots, teacher_slots: the rows on both sides.
        origin, teacher_origin, elements, teacher_elements: as in Slab.
        is_staged: whether the student's rows are those of the staging before, which a prefix has for every segment.
    """

    tiles: range
    units: range
    slots: range
    teacher_slots: range
    origin: int
    teacher_origin: int
    elements: int
    teacher_elements: int
    is_staged: bool = False


class Range(NamedTuple):
    """The student's tokens of a prefix, or of a segment without it, and their units (in the first of its segments)."""

    segments: range
    tokens: range
    units: range


class Plan:
    """The sections of MapProblem.plan as Python ints for launchers, read once for all the calls of a layout."""

    _of_layouts = WeakTensorKeyDictionary()

    def __init__(self, host: Tensor, segments_per_example: int, num_examples: int):
        # Another tensor of the same storage, so that what remembers plans by their tensors keeps none alive.
        self._host = host.detach()
        self.bounds = [slice(*bound) for bound in self._host[: 2 * len(Section)].view(-1, 2).tolist()]
        self.segments_per_example = segments_per_example
        self.num_examples = num_examples
        self.segments = self.rows(Section.SEGMENTS, len(SegmentField))
        self.examples = self.rows(Section.EXAMPLES, len(ExampleField))

    @classmethod
    def of(cls, problem: MapProblem) -> Plan:
        """The plan of a problem's layout."""
        plan = cls._of_layouts.get(problem.plan)
        if plan is None:
            plan = cls._of_layouts[problem.plan] = cls(problem.plan, problem.segments, problem.num_examples)
        return plan

    @functools.cached_property
    def largest_range(self) -> int:
        """The elements of a workspace for the whole of one range and head group, on the side that needs more."""
        fields = (
            (SegmentField.FIRST_TOKEN, SegmentField.LAST_TOKEN, SegmentField.STRIDE),
            (SegmentField.PREFIX_FIRST_TOKEN, SegmentField.PREFIX_LAST_TOKEN, SegmentField.PREFIX_STRIDE),
            (SegmentField.TEACHER_FIRST_TOKEN, SegmentField.TEACHER_LAST_TOKEN, SegmentField.TEACHER_WIDTH),
        )
        return max((own[last] - own[first]) * own[width] for own in self.segments for first, last, width in fields)

    @property
    def total_elements(self) -> int:
        """The elements of a workspace for the whole batch and one head group."""
        fields = self.segments[-1]
        units = fields[SegmentField.LAST_UNIT] - fields[SegmentField.PART_UNIT]
        return fields[SegmentField.ORIGIN] + units * fields[SegmentField.STRIDE]

    def values(self, section: Section) -> list[int]:
        """A section's values on the host."""
        return self._host[self.bounds[section]].tolist()

    def rows(self, section: Section, width: int) -> list[list[int]]:
        """A section's rows on the host."""
        return self._host[self.bounds[section]].view(-1, width).tolist()

    @functools.cached_property
    def unit_tiles(self) -> list[list[int]]:
        """The rows of Section.UNIT_TILES."""
        return self.rows(Section.UNIT_TILES, 3)

    @functools.cached_property
    def slots(self) -> list[tuple[list[int], list[int]]]:
        """Of the student and of the teacher, the first slot of every unit, and these in order, each once."""
        sides = [self.values(section) for section in (Section.SLOTS, Section.TEACHER_SLOTS)]
        return [(slots, sorted(set(slots))) for slots in sides]

    @functools.cached_property
    def unit_of_token(self) -> list[int]:
        """The unit of every student token."""
        return self.values(Section.UNITS)

    @functools.cached_property
    def first_slots(self) -> dict[Section, list[int]]:
        """The first slot of every run on either side."""
        return {section: [run[3] for run in self.rows(section, 4)] for section in (Section.RUNS, Section.TEACHER_RUNS)}

    @functools.cached_property
    def ranges(self) -> list[list[Range]]:
        """Of every example its prefix, where it has one, and the rest of its segments."""
        examples = []
        for example in range(self.num_examples):
            segments = self.example_segments(example)
            parts = [Range(segments, *self._part(segments.start, PREFIX))] if self.is_shared(example) else []
            examples.append(parts + [Range(range(own, own + 1), *self._part(own, 0)) for own in segments])
        return examples

    def _part(self, segment: int, part: int) -> tuple[range, range]:
        fields = self.segments[segment]
        first, last, unit = (
            fields[part + field]
            for field in (SegmentField.FIRST_TOKEN, SegmentField.LAST_TOKEN, SegmentField.PART_UNIT)
        )
        stop = fields[SegmentField.PART_UNIT if part else SegmentField.LAST_UNIT]
        return range(first, last), range(unit, stop)

    def is_shared(self, example: int) -> bool:
        """Whether the segments of an example share a prefix."""
        fields = self.segments[example * self.segments_per_example]
        return fields[SegmentField.PREFIX_FIRST_TOKEN] < fields[SegmentField.PREFIX_LAST_TOKEN]

    @functools.cached_property
    def alike(self) -> list[tuple[range, bool]]:
        """Examples in a row that all share a prefix, or none of which does, and whether they do."""
        examples = itertools.groupby(range(self.num_examples), key=self.is_shared)
        runs = [(list(members), shared) for shared, members in examples]
        return [(range(members[0], members[-1] + 1), shared) for members, shared in runs]

    def tokens(self, examples: range) -> range:
        """The student's tokens of some examples."""
        return range(self.ranges[examples.start][0].tokens.start, self.ranges[examples.stop - 1][-1].tokens.stop)

    def row_tiles(self, tokens: range, size: int) -> range:
        """The row tiles that hold some tokens."""
        firsts = self._row_starts[size]
        return range(bisect.bisect_right(firsts, tokens.start) - 1, bisect.bisect_left(firsts, tokens.stop))

    @functools.cached_property
    def _row_starts(self) -> dict[int, list[int]]:
        sections = {size: Section[f"ROWS_{size}"] for size in TILE_SIZES}
        return {size: [tile[1] for tile in self.rows(section, 3)] for size, section in sections.items()}

    def pairs(self, tiles: range, examples: range, rows: ExampleField, pairs: ExampleField) -> range:
        """The pairs of some row tiles of some examples with all column tiles of their example."""
        return range(
            self._pairs_before(tiles.start, examples, rows, pairs),
            self._pairs_before(tiles.stop - 1, examples, rows, pairs, after=1),
        )

    def _pairs_before(self, tile: int, examples: range, rows: ExampleField, pairs: ExampleField, after: int = 0) -> int:
        # The last of the examples that begin at the tile or before, so that empty ones are passed over.
        example = bisect.bisect_right(self.examples, tile, key=lambda counts: counts[rows]) - 1
        before, own = self.examples[example], self.examples[example + 1]
        columns = (own[pairs] - before[pairs]) // (own[rows] - before[rows])
        return before[pairs] + (tile + after - before[rows]) * columns

    def slabs(self, num_head_groups: int, element_bytes: float, workspace_bytes: int) -> list[Slab]:
        """Slabs of at most workspace_bytes, or of SLAB_ROWS tokens of one group: examples together while they fit.

        Examples that share a prefix are not put with others: these take the kernels that they take alone. An example
        that does not fit is cut by groups, then by ranges of tokens, then by rows.
        """
        slabs = []
        for examples, _ in self.alike:
            pending, held = range(0), 0.0
            for example in examples:
                elements = sum(self._elements(own, own.units) for own in self.ranges[example])
                if not elements:
                    continue
                needed = elements * num_head_groups * element_bytes
                if pending and held + needed > workspace_bytes:
                    slabs.append(self._whole_slab(pending, range(num_head_groups)))
                    pending, held = range(0), 0.0
                if needed > workspace_bytes:
                    slabs.extend(self._cut(example, num_head_groups, element_bytes, workspace_bytes))
                else:
                    pending, held = range(pending.start if pending else example, example + 1), held + needed
            if pending:
                slabs.append(self._whole_slab(pending, range(num_head_groups)))
        return slabs

    def example_segments(self, example: int) -> range:
        """The segments of an example."""
        return range(example * self.segments_per_example, (example + 1) * self.segments_per_example)

    def _elements(self, own: Range, units: range) -> int:
        return len(own.segments) * len(units) * self.segments[own.segments.start][SegmentField.WIDTH]

    def _whole_slab(self, examples: range, groups: range, begins: bool = True, ends: bool = True) -> Slab:
        first, last = self.ranges[examples.start][0], self.ranges[examples.stop - 1][-1]
        segments = range(first.segments.start, last.segments.stop)
        units = range(first.units.start, last.units.stop)
        origin = self._address(first, first.units.start)
        elements = self._address(last, last.units.stop) - origin
        shared = self.is_shared(examples.start)
        return Slab(
            groups, examples, segments, self.tokens(examples), units, origin, elements, shared, True, begins, ends
        )

    def _address(self, own: Range, unit: int) -> int:
        """Where a unit's rows begin."""
        fields = self.segments[own.segments.start]
        part = 0 if own.tokens.start == fields[SegmentField.FIRST_TOKEN] else PREFIX
        first = fields[part + SegmentField.PART_UNIT]
        return fields[part + SegmentField.ORIGIN] + (unit - first) * fields[part + SegmentField.STRIDE]

    def _cut(self, example: int, num_head_groups: int, element_bytes: float, workspace_bytes: int) -> Iterator[Slab]:
        examples, ranges, shared = range(example, example + 1), self.ranges[example], self.is_shared(example)
        whole_bytes = sum(self._elements(own, own.units) for own in ranges) * element_bytes
        groups_at_once = int(workspace_bytes // whole_bytes)
        if groups_at_once:
            for first in range(0, num_head_groups, groups_at_once):
                groups = range(first, min(first + groups_at_once, num_head_groups))
                yield self._whole_slab(examples, groups, first == 0, groups.stop == num_head_groups)
            return
        parts = []
        for own in ranges:
            rows = max(len(own.tokens), 1)
            if self._elements(own, own.units) * element_bytes > workspace_bytes:
                # A slab has no more unit rows than tokens.
                row_bytes = self._elements(own, range(1)) * element_bytes
                rows = max(SLAB_ROWS, int(workspace_bytes // row_bytes) // SLAB_ROWS * SLAB_ROWS)
            parts += [
                (own, range(first, min(first + rows, own.tokens.stop)))
                for first in range(own.tokens.start, own.tokens.stop, rows)
            ]
        for group in range(num_head_groups):
            for index, (own, tokens) in enumerate(parts):
                units = range(self.unit_of_token[tokens.start], self.unit_of_token[tokens.stop - 1] + 1)
                yield Slab(
                    groups=range(group, group + 1),
                    examples=examples,
                    segments=own.segments,
                    tokens=tokens,
                    units=units,
                    origin=self._address(own, units.start),
                    elements=self._elements(own, units),
                    is_shared=shared,
                    is_whole=not shared and tokens == own.tokens,
                    begins=group == index == 0,
                    ends=group == num_head_groups - 1 and index == len(parts) - 1,
                )

    def stagings(self, slab: Slab, workspace_bytes: int) -> Iterator[Staging]:
        """A slab's units in pieces of at most workspace_bytes of staged float32 rows, or of one unit tile.

        Where a prefix is shared, a piece is whole examples, or lies within a range. That of a prefix is compared for
        one segment after the other, and the student's rows are staged once.
        """
        if not slab.is_shared:
            yield from self._pieces(slab, [slab.units], workspace_bytes)
            return
        pending = range(0)
        for example in slab.examples:
            if slab.is_whole:
                joined = range(pending.start if pending else example, example + 1)
                if not pending or self._staged_bytes(slab, [self._whole_staging(joined)]) <= workspace_bytes:
                    pending = joined
                    continue
                yield from self._staged_together(slab, pending, workspace_bytes)
                pending = joined[-1:]
            else:
                yield from self._staged_apart(slab, example, workspace_bytes)
        if pending:
            yield from self._staged_together(slab, pending, workspace_bytes)

    def _staged_together(self, slab: Slab, examples: range, workspace_bytes: int) -> Iterator[Staging]:
        """Whole examples in one piece; one alone that does not fit, range by range."""
        staging = self._whole_staging(examples)
        if self._staged_bytes(slab, [staging]) <= workspace_bytes:
            yield staging
        else:
            yield from self._staged_apart(slab, examples.start, workspace_bytes)

    def _staged_apart(self, slab: Slab, example: int, workspace_bytes: int) -> Iterator[Staging]:
        for own in self.ranges[example]:
            units = range(max(own.units.start, slab.units.start), min(own.units.stop, slab.units.stop))
            if units and (slab.is_whole or own.segments == slab.segments):
                first = self.segments[own.segments.start][SegmentField.FIRST_UNIT]
                shifts = [self.segments[segment][SegmentField.FIRST_UNIT] - first for segment in own.segments]
                copies = [range(units.start + shift, units.stop + shift) for shift in shifts]
                yield from self._pieces(slab, copies, workspace_bytes)

    def _whole_staging(self, examples: range) -> Staging:
        held = [own.units for example in examples for own in self.ranges[example] if own.units]
        units = range(
            held[0].start, self.segments[examples.stop * self.segments_per_example - 1][SegmentField.LAST_UNIT]
        )
        return self._staging(units, held[-1][-1])

    def _staging(self, units: range, last_unit: int, is_staged: bool = False) -> Staging:
        """Of some units; the student's last row is that of last_unit."""
        (own, origin, elements), (teacher, teacher_origin, teacher_elements) = (
            self._staged_rows(side, units.start, last) for side, last in enumerate((last_unit, units[-1]))
        )
        tiles = self.tiles_of(units)
        return Staging(tiles, units, own, teacher, origin, teacher_origin, elements, teacher_elements, is_staged)

    def _staged_rows(self, side: int, first_unit: int, last_unit: int) -> tuple[range, int, int]:
        """On one side the slots from one unit to another, where they begin and how many elements they have."""
        (origin, width), (slots, ordered) = STAGED[side], self.slots[side]
        stop = ordered[bisect.bisect_right(ordered, slots[last_unit])]
        begin, end = (
            fields[origin] + (slot - slots[fields[SegmentField.FIRST_UNIT]]) * fields[width]
            for slot, fields in ((slots[first_unit], self._segment_of(first_unit)), (stop, self._segment_of(last_unit)))
        )
        return range(slots[first_unit], stop), begin, end - begin

    def _segment_of(self, unit: int) -> list[int]:
        """The fields of a unit's segment; empty ones before it begin where it does."""
        index = bisect.bisect_right(self.segments, unit, key=lambda fields: fields[SegmentField.FIRST_UNIT])
        return self.segments[index - 1]

    def tiles_of(self, units: range) -> range:
        """The unit tiles that hold some units."""
        return range(
            bisect.bisect_right(self.unit_tiles, units.start, key=lambda tile: tile[1]) - 1,
            bisect.bisect_left(self.unit_tiles, units.stop, key=lambda tile: tile[1]),
        )

    def _staged_bytes(self, slab: Slab, stagings: list[Staging]) -> int:
        elements = stagings[0].elements + max(staging.teacher_elements for staging in stagings)
        return 4 * len(slab.groups) * elements

    def _pieces(self, slab: Slab, copies: list[range], workspace_bytes: int) -> Iterator[Staging]:
        """Units in pieces of whole tiles, each with its likes in the other segments."""
        tiles = self.tiles_of(copies[0])

        def piece(first: int, last: int) -> list[Staging]:
            start = max(self.unit_tiles[first][1], copies[0].start) - copies[0].start
            stop = min(self.unit_tiles[last][2], copies[0].stop) - copies[0].start
            units = [copy[start:stop] for copy in copies]
            return [self._staging(own, own[-1], is_staged=index > 0) for index, own in enumerate(units)]

        first = tiles.start
        while first < tiles.stop:
            # The last tile that still fits; what is needed grows with it.
            ends = range(first + 1, tiles.stop)
            last = first + bisect.bisect_right(
                ends, workspace_bytes, key=lambda end, first=first: self._staged_bytes(slab, piece(first, end))
            )
            yield from piece(first, last)
            first = last + 1

    def runs(self, slots: range, section: Section) -> range:
        """The runs that hold some slots."""
        firsts = self.first_slots[section]
        return range(bisect.bisect_right(firsts, slots.start) - 1, bisect.bisect_left(firsts, slots.stop))
