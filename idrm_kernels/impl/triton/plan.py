"""A batch's tile plan as the launchers read it, and its cutting into slabs whose workspace stays within its bound."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from idrm_kernels.impl.problem import MapProblem
from idrm_kernels.tiles import ExampleField, Section, SegmentField

# The fields that place the student's and the teacher's staged rows.
STAGED = (
    (SegmentField.SLOT_ORIGIN, SegmentField.WIDTH),
    (SegmentField.TEACHER_SLOT_ORIGIN, SegmentField.TEACHER_WIDTH),
)
# A slab begins at a multiple of this many tokens of its segment, so that it cuts no tile of the key gradient's rows.
SLAB_ROWS = 64


class Slab(NamedTuple):
    """Rows whose differences are held at once.

    Attributes:
        groups, examples, segments, tokens, units: what it covers; units are all that tokens, the student's, touch.
        origin, elements: its place in, and its part of, a workspace for the whole batch and one head group.
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
    is_whole: bool
    begins: bool
    ends: bool


class Staging(NamedTuple):
    """Units whose rows of both maps are held at once: the tiles to compare, and where they begin.

    Attributes:
        tiles: of Section.UNIT_TILES.
        slots, teacher_slots: the rows on both sides.
        origin, teacher_origin, elements, teacher_elements: as in Slab.
    """

    tiles: range
    slots: range
    teacher_slots: range
    origin: int
    teacher_origin: int
    elements: int
    teacher_elements: int


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
    def largest_segment(self) -> int:
        """The elements of a workspace for the whole of one segment and head group, on the side that needs more."""
        fields = (
            (SegmentField.FIRST_TOKEN, SegmentField.LAST_TOKEN, SegmentField.WIDTH),
            (SegmentField.TEACHER_FIRST_TOKEN, SegmentField.TEACHER_LAST_TOKEN, SegmentField.TEACHER_WIDTH),
        )
        return max((own[last] - own[first]) * own[width] for own in self.segments for first, last, width in fields)

    @property
    def total_elements(self) -> int:
        """The elements of a workspace for the whole batch and one head group."""
        fields = self.segments[-1]
        units = fields[SegmentField.LAST_UNIT] - fields[SegmentField.FIRST_UNIT]
        return fields[SegmentField.ORIGIN] + units * fields[SegmentField.WIDTH]

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
    def slots(self) -> tuple[list[int], list[int]]:
        """Of the student and of the teacher, the first slot of every unit."""
        return self.values(Section.SLOTS), self.values(Section.TEACHER_SLOTS)

    @functools.cached_property
    def unit_of_token(self) -> list[int]:
        """The unit of every student token."""
        return self.values(Section.UNITS)

    @functools.cached_property
    def first_slots(self) -> dict[Section, list[int]]:
        """The first slot of every run on either side."""
        return {section: [run[3] for run in self.rows(section, 4)] for section in (Section.RUNS, Section.TEACHER_RUNS)}

    def segment(self, segment: int, field: SegmentField) -> int:
        """One count of a segment."""
        return self.segments[segment][field]

    def tokens(self, segment: int) -> range:
        """The student's tokens of a segment."""
        return range(self.segments[segment][SegmentField.FIRST_TOKEN], self.segments[segment][SegmentField.LAST_TOKEN])

    def row_tiles(self, tokens: range, segments: range, size: int) -> range:
        """The row tiles that touch some tokens of some segments, all but the first and the last of which are whole."""
        first = self.tiles_before(segments.start, size) + (tokens.start - self.tokens(segments.start).start) // size
        rest = tokens.stop - self.tokens(segments.stop - 1).start
        return range(first, self.tiles_before(segments.stop - 1, size) + -(-rest // size))

    def tiles_before(self, segment: int, size: int) -> int:
        """How many row tiles the segments before one have."""
        example = segment // self.segments_per_example
        counted = self.examples[example][ExampleField[f"ROWS_{size}"]]
        earlier = range(example * self.segments_per_example, segment)
        return counted + sum(-(-len(self.tokens(other)) // size) for other in earlier)

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
        """Slabs of at most workspace_bytes, or of SLAB_ROWS rows of one group: examples together while they fit.

        An example that does not fit alone is cut by groups, then by query segments, then by rows.
        """
        slabs, pending, held = [], range(0), 0.0
        for example in range(self.num_examples):
            segments = self.example_segments(example)
            elements = sum(self._elements(self.segment_units(segment), segment) for segment in segments)
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

    def segment_units(self, segment: int) -> range:
        """The units of a segment."""
        return range(self.segments[segment][SegmentField.FIRST_UNIT], self.segments[segment][SegmentField.LAST_UNIT])

    def _elements(self, units: range, segment: int) -> int:
        return len(units) * self.segments[segment][SegmentField.WIDTH]

    def _whole_slab(self, examples: range, groups: range, begins: bool = True, ends: bool = True) -> Slab:
        segments = range(examples.start * self.segments_per_example, examples.stop * self.segments_per_example)
        return self._slab(examples, groups, segments, self._tokens_of(segments), True, begins, ends)

    def _tokens_of(self, segments: range) -> range:
        return range(self.tokens(segments.start).start, self.tokens(segments.stop - 1).stop)

    def _slab(
        self, examples: range, groups: range, segments: range, tokens: range, is_whole: bool, begins: bool, ends: bool
    ) -> Slab:
        if is_whole:
            units = range(self.segment_units(segments.start).start, self.segment_units(segments.stop - 1).stop)
        else:
            units = range(self.unit_of_token[tokens.start], self.unit_of_token[tokens.stop - 1] + 1)
        origin = self._address(units.start, segments.start)
        elements = self._address(units.stop, segments.stop - 1) - origin
        return Slab(groups, examples, segments, tokens, units, origin, elements, is_whole, begins, ends)

    def _address(self, unit: int, segment: int) -> int:
        fields = self.segments[segment]
        return fields[SegmentField.ORIGIN] + (unit - fields[SegmentField.FIRST_UNIT]) * fields[SegmentField.WIDTH]

    def _cut(self, example: int, num_head_groups: int, element_bytes: float, workspace_bytes: int) -> Iterator[Slab]:
        segments = self.example_segments(example)
        examples = range(example, example + 1)
        width = self.segments[segments.start][SegmentField.WIDTH]
        row_bytes = width * element_bytes
        whole_bytes = sum(len(self.segment_units(segment)) for segment in segments) * row_bytes
        groups_at_once = int(workspace_bytes // whole_bytes)
        if groups_at_once:
            for first in range(0, num_head_groups, groups_at_once):
                groups = range(first, min(first + groups_at_once, num_head_groups))
                yield self._whole_slab(examples, groups, first == 0, groups.stop == num_head_groups)
            return
        # A slab has no more unit rows than tokens.
        rows = max(SLAB_ROWS, int(workspace_bytes // row_bytes) // SLAB_ROWS * SLAB_ROWS)
        parts = []
        for segment in segments:
            tokens = self.tokens(segment)
            if len(self.segment_units(segment)) * row_bytes <= workspace_bytes:
                parts.append((range(segment, segment + 1), tokens, True))
            else:
                for first in range(tokens.start, tokens.stop, rows):
                    part = range(first, min(first + rows, tokens.stop))
                    parts.append((range(segment, segment + 1), part, part == tokens))
        parts = [part for part in parts if part[1]]
        for group in range(num_head_groups):
            for index, (own, tokens, is_whole) in enumerate(parts):
                begins = group == index == 0
                ends = group == num_head_groups - 1 and index == len(parts) - 1
                yield self._slab(examples, range(group, group + 1), own, tokens, is_whole, begins, ends)

    def stagings(self, slab: Slab, workspace_bytes: int) -> Iterator[Staging]:
        """A slab's units in pieces of at most workspace_bytes of staged float32 rows, or of one unit tile."""
        unit_tiles = self.unit_tiles

        def pieces(first: int, last: int) -> list[tuple[range, int, int]]:
            """On either side the slots of some unit tiles, where they begin and how many elements they have."""
            (segment, start, _), (last_segment, _, stop) = unit_tiles[first], unit_tiles[last]
            units = range(max(start, slab.units.start), min(stop, slab.units.stop))
            both = []
            for slots, (origin, width) in zip(self.slots, STAGED, strict=True):
                begin, end = (
                    self.segments[own][origin]
                    + (slots[unit] - slots[self.segments[own][SegmentField.FIRST_UNIT]]) * self.segments[own][width]
                    for unit, own in ((units.start, segment), (units.stop, last_segment))
                )
                both.append((range(slots[units.start], slots[units.stop]), begin, end - begin))
            return both

        def needed(first: int, last: int) -> int:
            return 4 * len(slab.groups) * sum(elements for _, _, elements in pieces(first, last))

        first = bisect.bisect_right(unit_tiles, slab.units.start, key=lambda tile: tile[1]) - 1
        stop = bisect.bisect_left(unit_tiles, slab.units.stop, key=lambda tile: tile[1])
        while first < stop:
            # The last tile that still fits; what is needed grows with it.
            last = bisect.bisect_right(range(first + 1, stop), workspace_bytes, key=lambda end: needed(first, end))
            last += first
            (own, origin, elements), (teacher, teacher_origin, teacher_elements) = pieces(first, last)
            yield Staging(range(first, last + 1), own, teacher, origin, teacher_origin, elements, teacher_elements)
            first = last + 1

    def runs(self, slots: range, section: Section) -> range:
        """The runs that hold some slots."""
        firsts = self.first_slots[section]
        return range(bisect.bisect_right(firsts, slots.start) - 1, bisect.bisect_left(firsts, slots.stop))
