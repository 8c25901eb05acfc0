"""Row chunks on any device: loss and gradients in one sweep over the rows, at most one tile of every map at a time.

A chunk is a run of whole units of at most TILE_ROWS student tokens (a longer unit is a chunk of its own, in pieces);
heads pass through in blocks. What a chunk contains follows from its example alone, never from ``workspace_bytes``,
which only decides whether the student's probabilities are kept for the gradient or computed again: so the result does
not depend on it, nor on the other examples of the batch, not in a bit.

A prefix that segments share, where it is half of them or more, is scored once, as rows and as keys: its probabilities
are laid out for every segment's softmax afterwards, and their gradients summed before they are multiplied. Its rows
have the same map in every query segment, and as many teachers; so the gradient of an example that shares a prefix takes
a sweep of its own, when the losses of all its blocks are known. Where they fit in the workspace, the first sweep keeps
both models' maps for it. A shorter prefix is repeated: two sweeps would take longer than it saves.

With t = TILE_ROWS and N the tokens of an example, the live memory beside inputs, gradients and buffers linear in N is
workspace_bytes at most where probabilities are kept; where they are not, two blocks of t x N for some of the heads (one
head, or as many as fit in *_HEAD_BLOCK_BYTES) and AVERAGED_TILES tiles t x N, one more a segment where "joint" meets
"frobenius"; where a prefix is shared, four blocks, and AVERAGED_TILES for every query segment. In half precision the
products are taken in float32, under torch's float32 matmul precision.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from idrm_kernels import reduction
from idrm_kernels.impl.problem import Attention, LossOptions, LossOutput, MapProblem

TILE_ROWS = 64
# Rows x keys tiles without heads that are live at most: both models' U, their difference, its gradient, by unit and by
# token, and what transposing them takes.
AVERAGED_TILES = 10
# The share of an example's tokens, in all segments, from which on a prefix is scored once. Measured on a CPU with 16 x
# 64 heads: at a quarter that took 15 to 25% more time than a repeated prefix, at 0.58 between 25% more and 15% less,
# the latter at 2 x 1024 tokens, at 0.9 a quarter to 40% less.
LEAST_SHARE = 0.5
# One block of heads of a tile: near a core's second-level cache on a CPU, enough work per launch on an accelerator.
CPU_HEAD_BLOCK_BYTES, ACCELERATOR_HEAD_BLOCK_BYTES = 1 << 20, 8 << 20


def unit_runs(offsets: list[int], units: range) -> Iterator[range]:
    """Runs of whole units of at most TILE_ROWS tokens; a longer unit alone."""
    start = units.start
    while start < units.stop:
        stop = start + 1
        while stop < units.stop and offsets[stop + 1] - offsets[start] <= TILE_ROWS:
            stop += 1
        yield range(start, stop)
        start = stop


class UnitRuns(NamedTuple):
    """Consecutive units as runs of tokens: ``offsets`` counts from their first token; None where a unit is a token."""

    offsets: Tensor | None
    token_counts: Tensor | None

    @classmethod
    def of(cls, side: Attention, units: range) -> UnitRuns:
        """The runs of some units on one side."""
        first, last = side.unit_offsets[units.start], side.unit_offsets[units.stop]
        if last - first == len(units):
            return cls(None, None)
        offsets = side.device_unit_offsets[units.start : units.stop + 1] - first
        return cls(offsets, offsets.diff())

    def summed(self, tokens: Tensor) -> Tensor:
        """(units, ...) from (tokens, ...)."""
        if self.offsets is None:
            return tokens
        return torch.segment_reduce(tokens.contiguous(), "sum", offsets=self.offsets, axis=0, unsafe=True)

    def averaged(self, tokens: Tensor) -> Tensor:
        """(units, ...) from (tokens, ...), the mean over each unit's tokens."""
        if self.offsets is None:
            return tokens
        return self.summed(tokens) / self.token_counts[:, None].to(tokens.dtype)

    def spread(self, units: Tensor, num_tokens: int) -> Tensor:
        """(tokens, ...) from (units, ...): every token gets its unit's values."""
        if self.offsets is None:
            return units
        return units.repeat_interleave(self.token_counts, dim=0, output_size=num_tokens)


class GroupAttention:
    """The queries and keys of one example and head group on one side.

    Attributes:
        heads: number of query heads in the group.
        num_keys: tokens of the example, all its segments' together.
        prefix: tokens that all segments begin with and k holds once.
        segment_keys: the tokens of every segment, counted within the example.
        supports: the keys that a softmax runs over: all of them, or those of each segment that has any.
        k: (heads, rows of the example, head_dim) in the compute dtype, keys repeated for the query heads that share
            them; a row is a token, but for a shared prefix.
    """

    def __init__(self, problem: MapProblem, side: Attention, example: int, group: int):
        segments = problem.example_segments(example)
        units = range(segments[0].start, segments[-1].stop)
        num_heads = side.q.shape[1]
        self.side = side
        self.dtype = problem.dtype
        self.heads = num_heads // problem.num_head_groups
        self.first_head = group * self.heads
        self.first_key, self.last_key = side.unit_offsets[units.start], side.unit_offsets[units.stop]
        self.num_keys = self.last_key - self.first_key
        if side.token_index is None:
            self.prefix, own = 0, range(self.first_key, self.last_key)
        else:
            self.prefix, own = problem.prefix_tokens(example), problem.example_rows[example]
        starts = [side.unit_offsets[segment.start] - self.first_key for segment in segments] + [self.num_keys]
        self.segment_keys = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        if problem.normalization == "joint":
            self.supports = [slice(0, self.num_keys)]
        else:
            self.supports = [keys for keys in self.segment_keys if keys.start < keys.stop]
        shared = num_heads // side.k.shape[1]
        self.kv_heads = [head // shared for head in range(self.first_head, self.first_head + self.heads)]
        k = side.k[own.start : own.stop, self.kv_heads[0] : self.kv_heads[-1] + 1].to(self.dtype)
        k = k.repeat_interleave(shared, dim=1)[:, self.first_head % shared :][:, : self.heads]
        self.k = k.transpose(0, 1).contiguous()
        self.key_runs = UnitRuns.of(side, units)
        on_cpu = side.q.device.type == "cpu"
        block_bytes = CPU_HEAD_BLOCK_BYTES if on_cpu else ACCELERATOR_HEAD_BLOCK_BYTES
        head_bytes = TILE_ROWS * self.num_keys * self.dtype.itemsize
        self.block = max(1, min(self.heads, block_bytes // head_bytes))

    def head_blocks(self) -> Iterator[slice]:
        """Slices over the heads of the group."""
        for first in range(0, self.heads, self.block):
            yield slice(first, min(first + self.block, self.heads))

    def queries(self, rows: range, heads: slice) -> Tensor:
        """(heads of the block, rows, head_dim), contiguous whatever the packing."""
        first, last = self.first_head + heads.start, self.first_head + heads.stop
        first_row = self.side.row(rows.start)
        q = self.side.q[first_row : first_row + len(rows), first:last]
        return q.to(self.dtype).transpose(0, 1).contiguous()

    def probabilities(self, rows: range, heads: slice) -> Tensor:
        """Softmax over each support: (heads of the block, rows, num_keys)."""
        scores = torch.bmm(self.queries(rows, heads), self.k[heads].transpose(1, 2)).mul_(self.side.softmax_scale)
        if self.prefix:
            scores = self.by_segment(scores)
        if self.side.positions is not None:
            self.add_position_bias(scores, rows, heads)
        if self.side.causal:
            keys = torch.arange(self.first_key, self.last_key, device=scores.device)
            queries = torch.arange(rows.start, rows.stop, device=scores.device)
            scores.masked_fill_(keys > queries[:, None], -torch.inf)
        for support in self.supports:
            part = scores[..., support]
            part.sub_(part.amax(-1, keepdim=True)).exp_()
            part.div_(part.sum(-1, keepdim=True))
        return scores

    def by_segment(self, scores: Tensor) -> Tensor:
        """(..., num_keys) from (..., rows of the example): the shared prefix before the rest of every segment."""
        prefix = scores[..., : self.prefix]
        rests = scores[..., self.prefix :].split([self.rest(keys) for keys in self.segment_keys], dim=-1)
        return torch.cat([part for rest in rests for part in (prefix, rest)], dim=-1)

    def by_row(self, d_scores: Tensor) -> Tensor:
        """(..., rows of the example) from (..., num_keys): the gradients of a shared prefix's scores summed."""
        return _prefixes_summed([d_scores[..., keys] for keys in self.segment_keys], self.prefix, dim=-1)

    def rest(self, keys: slice) -> int:
        """Tokens of a segment behind the shared prefix."""
        return keys.stop - keys.start - self.prefix

    def add_position_bias(self, scores: Tensor, rows: range, heads: slice) -> None:
        """Adds c2p and p2c of DESIGN section 2.2."""
        side = self.side
        own = slice(self.first_head + heads.start, self.first_head + heads.stop)
        queries, keys = slice(rows.start, rows.stop), slice(self.first_key, self.last_key)
        limit = side.slot_of_delta.numel() // 2
        delta = side.positions[queries].long()[:, None] - side.positions[keys].long()
        slots = side.slot_of_delta[delta.clamp_(-limit, limit).add_(limit)].long()
        if side.c2p is not None:
            table = side.c2p[queries, own].transpose(0, 1)
            scores.add_(table.gather(2, slots.expand_as(scores)))
        if side.p2c is not None:
            table = side.p2c[keys, own].transpose(0, 1)
            by_key = slots.T.expand(scores.shape[0], -1, -1)
            scores.add_(table.gather(2, by_key).transpose(1, 2))

    def merged_rows(self, units: range, kept: deque[Tensor] | None = None) -> Tensor:
        """U (units, units of the example): heads averaged, keys of a unit summed, rows of a unit averaged.

        Probabilities are appended to ``kept``, piece by piece and block by block, where one is given.
        """
        merged = []
        for run in unit_runs(self.side.unit_offsets, units):
            pieces = (self.token_rows(rows, kept) for rows in self.pieces(run))
            if len(run) > 1:
                merged.append(UnitRuns.of(self.side, run).averaged(next(pieces)))
            else:
                num_tokens = self.side.unit_offsets[run.stop] - self.side.unit_offsets[run.start]
                merged.append(
                    functools.reduce(Tensor.add_, (rows.sum(0, keepdim=True) for rows in pieces)) / num_tokens
                )
        return torch.cat(merged)

    def token_rows(self, rows: range, kept: deque[Tensor] | None) -> Tensor:
        """The head-averaged map of some tokens, keys of a unit summed (rows, units of the example)."""
        total = self.k.new_zeros(len(rows), self.num_keys)
        for heads in self.head_blocks():
            block = self.probabilities(rows, heads)
            total.add_(block.sum(0))
            if kept is not None:
                kept.append(block)
        return self.key_runs.summed(total.div_(self.heads).T).T

    def pieces(self, units: range) -> Iterator[range]:
        """The tokens of some units in ranges of at most TILE_ROWS."""
        first, last = self.side.unit_offsets[units.start], self.side.unit_offsets[units.stop]
        for start in range(first, last, TILE_ROWS):
            yield range(start, min(start + TILE_ROWS, last))


def _prefixes_summed(segments: list[Tensor], prefix: int, dim: int) -> Tensor:
    """What a shared prefix has in every segment summed, and the rest of each behind it."""
    parts = [segment.split([prefix, segment.shape[dim] - prefix], dim) for segment in segments]
    return torch.cat([functools.reduce(torch.add, (first for first, _ in parts)), *(rest for _, rest in parts)], dim)


class Component(NamedTuple):
    """A part of a block's gradient that is to be multiplied with a factor of its own.

    Attributes:
        maps: the keys whose probabilities it differentiates by; the derivative is 0 elsewhere.
        scores: the keys whose scores it reaches, through the softmax.
        supports: those of the softmax, counted from the first of ``scores``.
    """

    maps: slice
    scores: slice
    supports: list[slice]


class Maps(NamedTuple):
    """Some unit rows of U (units, units of the example): the student's, and the teacher's in each query segment."""

    student: Tensor
    teachers: list[Tensor]


class Chunk:
    """Some unit rows against all units of their example: their distances, and what their gradient needs."""

    def __init__(self, block: Block, units: range, needs_grad: bool, maps: Maps | None = None):
        self.problem = block.problem
        self.student = block.student
        self.units = units
        self.kept = None
        if maps is None:
            workspace = block.tile_bytes(units) + block.probability_bytes(units)
            if needs_grad and workspace <= self.problem.workspace_bytes:
                self.kept = deque()
            maps = Maps(self.student.merged_rows(units, self.kept), block.teacher_maps(units))
        self.map, self.teachers = maps

    def distances(self, columns: list[slice]) -> list[Tensor]:
        """(units, segments) for each of the teachers."""
        return [self.distances_to(teacher, columns) for teacher in self.teachers]

    def distances_to(self, teacher: Tensor, columns: list[slice]) -> Tensor:
        """(units, segments)."""
        if self.problem.metric == "l2":
            entries = (self.map - teacher).square_()
        else:
            # The logarithm of a quotient near 1 and a difference of close numbers lose no bits to cancellation.
            entries = torch.xlogy(teacher, teacher / self.map.clamp_min(1e-30))
            entries.add_(self.map - teacher)
        return torch.stack([entries[:, y].sum(1) for y in columns], dim=1).clamp_min_(0)

    def map_gradient(
        self, coefficients: list[Tensor], columns: list[slice], block_weights: Sequence[float] | None = None
    ) -> Tensor:
        """d loss / d U (units, units of the example), from d loss / d distance to each teacher (units, segments).

        The latter times block_weights (segments,), where they are given.
        """
        parts = []
        for teacher, own in zip(self.teachers, coefficients, strict=True):
            if self.problem.metric == "l2":
                part = (self.map - teacher).mul_(2)
            else:
                quotient = teacher / self.map.clamp_min(1e-30)
                part = 1 - quotient.masked_fill_(self.map <= 1e-30, 0)
            for y, keys in enumerate(columns):
                factor = own[:, y, None]
                part[:, keys] *= factor if block_weights is None else factor * block_weights[y]
            parts.append(part)
        return functools.reduce(Tensor.add_, parts)

    def add_gradients(
        self, d_map: Tensor, components: list[Component], dq: Tensor, dk: list[Tensor], first: int
    ) -> None:
        """Adds this chunk's part of the gradients of some components; once, for it lets go of what was kept.

        Args:
            d_map: (units, units of the example), the derivatives by U.
            components: how they are told apart.
            dq: (components, tokens of the query segment, heads, head_dim); ``first`` is its first token.
            dk: for each component (heads, tokens of its scores, head_dim); where a prefix is shared there is one
                component, of all keys, with (heads, rows of the example, head_dim).
        """
        student, offsets = self.student, self.student.side.unit_offsets
        scale = student.side.softmax_scale
        unit_rows = UnitRuns.of(student.side, self.units)
        d_map = d_map / student.heads
        if unit_rows.token_counts is not None:
            d_map = d_map / unit_rows.token_counts[:, None]
        by_key = student.key_runs.spread(d_map.T, student.num_keys).T
        # A unit alone, which may be long, has one row for all its tokens; the tokens of others make one piece.
        if len(self.units) > 1:
            by_key = unit_rows.spread(by_key, offsets[self.units.stop] - offsets[self.units.start])
        d_probabilities = [_confined(by_key, component) for component in components]
        for rows in student.pieces(self.units):
            own = slice(rows.start - first, rows.stop - first)
            for heads in student.head_blocks():
                p = student.probabilities(rows, heads) if self.kept is None else self.kept.popleft()
                q = student.queries(rows, heads)
                for index, (component, dp) in enumerate(zip(components, d_probabilities, strict=True)):
                    p_scores = p[..., component.scores]
                    d_scores = p_scores * dp
                    for support in component.supports:
                        part = d_scores[..., support]
                        torch.sub(dp[:, support], part.sum(-1, keepdim=True), out=part)
                    d_scores.mul_(p_scores)
                    if student.prefix:
                        d_scores = student.by_row(d_scores)
                        k = student.k[heads]
                    else:
                        k = student.k[heads, component.scores]
                    dq[index, own, heads] += torch.bmm(d_scores, k).mul_(scale).transpose(0, 1)
                    dk[index][heads] += torch.bmm(d_scores.transpose(1, 2), q).mul_(scale)


def _confined(by_key: Tensor, component: Component) -> Tensor:
    """(rows, keys of the component's scores) from (rows, keys): 0 where the component differentiates by nothing."""
    if component.maps == component.scores:
        return by_key[:, component.scores].contiguous()
    confined = torch.zeros_like(by_key, memory_format=torch.contiguous_format)
    confined[:, component.maps] = by_key[:, component.maps]
    return confined[:, component.scores]


class Block:
    """Rows of an example against all its segments, for one head group: a sweep over chunks.

    Attributes:
        rows: units, the whole of a segment or, where a prefix is shared, the prefix or what follows it in a segment.
        x: their query segment; of a prefix, the first.
        copies: for every query segment that has these rows, how many units they come after ``rows``.
    """

    def __init__(
        self,
        problem: MapProblem,
        example: int,
        group: int,
        x: int,
        rows: range,
        copies: list[int],
        student: GroupAttention,
        teacher: GroupAttention | None,
    ):
        segments = problem.example_segments(example)
        self.problem = problem
        self.group = group
        self.x = x
        self.rows = rows
        self.copies = copies
        self.first_unit = segments[0].start
        self.columns = [slice(y.start - self.first_unit, y.stop - self.first_unit) for y in segments]
        self.student = student
        self.teacher = teacher
        if teacher is None:
            self.stored = problem.maps[example, group, :, : segments[-1].stop - self.first_unit]

    def runs(self) -> Iterator[range]:
        """The rows of every chunk."""
        return unit_runs(self.student.side.unit_offsets, self.rows)

    def teacher_maps(self, units: range) -> list[Tensor]:
        """The teacher's U for some unit rows in every query segment that has them (units, units of the example)."""
        return [self.teacher_rows(range(units.start + copy, units.stop + copy)) for copy in self.copies]

    def probability_bytes(self, units: range) -> int:
        """Of the student's P for some unit rows."""
        return self.student.heads * self._row_bytes(units)

    def tile_bytes(self, units: range) -> int:
        """Of what else is live at a time for them."""
        blocks = (4 if self.student.prefix else 2) * self.student.block
        return (blocks + len(self.copies) * AVERAGED_TILES) * self._row_bytes(units)

    def map_bytes(self) -> int:
        """Of the Maps of all rows."""
        columns = self.columns[-1].stop
        return (1 + len(self.copies)) * len(self.rows) * columns * self.student.dtype.itemsize

    def _row_bytes(self, units: range) -> int:
        offsets = self.student.side.unit_offsets
        return (offsets[units.stop] - offsets[units.start]) * self.student.num_keys * self.student.dtype.itemsize

    def each_copy(self, rows: Tensor, units: range) -> list[Tensor]:
        """The rows of some units, views, in every query segment that has them."""
        return [rows[units.start + copy : units.stop + copy] for copy in self.copies]

    def teacher_rows(self, units: range) -> Tensor:
        """The teacher's U for some unit rows (units, units of the example)."""
        if self.teacher is not None:
            return self.teacher.merged_rows(units)
        return self.stored[units.start - self.first_unit : units.stop - self.first_unit].to(self.problem.dtype)

    def whole(self) -> Component:
        """All key segments in one component."""
        keys = slice(0, self.student.num_keys)
        return Component(keys, keys, self.student.supports)

    def apart(self, y: int) -> Component:
        """One key segment as a component, which under "joint" reaches all keys through the softmax."""
        keys = self.student.segment_keys[y]
        if self.problem.normalization == "joint":
            return self.whole()._replace(maps=keys)
        return Component(keys, keys, [slice(0, keys.stop - keys.start)])

    def gradient_buffers(self, components: list[Component]) -> tuple[Tensor, list[Tensor]]:
        """Zeros for dq and dk of some components, as Chunk.add_gradients takes them."""
        offsets = self.student.side.unit_offsets
        heads, _, head_dim = self.student.k.shape
        num_rows = offsets[self.rows.stop] - offsets[self.rows.start]
        dq = self.student.k.new_zeros(len(components), num_rows, heads, head_dim)
        if self.student.prefix:
            return dq, [torch.zeros_like(self.student.k) for _ in components]
        return dq, [torch.zeros_like(self.student.k[:, component.scores]) for component in components]

    @property
    def first_row(self) -> int:
        """The first token of the query segment."""
        return self.student.side.unit_offsets[self.rows.start]


class ExampleGradients:
    """dq and dk of one example in the compute dtype, written out when all its blocks are done.

    ``batch`` is the problem that they are written for; ``problem`` is the same, or has a shared prefix repeated.
    """

    def __init__(self, problem: MapProblem, example: int, batch: MapProblem):
        self.problem, self.example, self.batch = problem, example, batch
        rows = problem.example_rows[example]
        self.first, self.last = rows.start, rows.stop
        self.dq, self.dk = (
            tensor.new_zeros((self.last - self.first, *tensor.shape[1:]), dtype=problem.dtype)
            for tensor in (problem.q, problem.k)
        )

    def add(self, block: Block, component: Component, dq: Tensor, dk: Tensor) -> None:
        """Adds a component's (rows, heads, head_dim) and (heads, keys of its scores, head_dim)."""
        student = block.student
        row = student.side.row(block.first_row) - self.first
        heads = slice(student.first_head, student.first_head + student.heads)
        self.dq[row : row + dq.shape[0], heads] += dq
        keys = slice(None) if student.prefix else component.scores
        for index, kv_head in enumerate(student.kv_heads):
            self.dk[keys, kv_head] += dk[index]

    def write(self, dq: Tensor, dk: Tensor) -> None:
        """Copies the sums into the gradients of the whole batch, in their dtype."""
        rows = self.batch.example_rows[self.example]
        for out, own in ((dq, self.dq), (dk, self.dk)):
            if len(own) != len(rows):
                bounds = [segment.start for segment in self.problem.example_segments(self.example)][1:]
                starts = [self.problem.student.unit_offsets[unit] - self.first for unit in bounds]
                own = _prefixes_summed(list(own.tensor_split(starts)), self.batch.prefix_tokens(self.example), dim=0)
            out[rows.start : rows.stop] = own


def example_blocks(problem: MapProblem, example: int) -> Iterator[Block]:
    """The blocks of an example, per head group and query segment that holds any units; a shared prefix is one more."""
    segments = problem.example_segments(example)
    if not any(segments):
        return
    shared = problem.shared_prefix(example)
    starts = [segment.start for segment in segments]
    own_rows = [(x, range(rows.start + shared, rows.stop), [0]) for x, rows in enumerate(segments)]
    if shared:
        own_rows.insert(0, (0, range(starts[0], starts[0] + shared), [start - starts[0] for start in starts]))
    for group in range(problem.num_head_groups):
        student = GroupAttention(problem, problem.student, example, group)
        teacher = GroupAttention(problem, problem.teacher, example, group) if problem.maps is None else None
        for x, rows, copies in own_rows:
            if len(rows):
                yield Block(problem, example, group, x, rows, copies, student, teacher)


def distance(problem: MapProblem) -> Tensor:
    """Row distances (num_head_groups, total_units, segments)."""
    shape = (problem.num_head_groups, problem.total_units, problem.segments)
    distances = torch.zeros(shape, dtype=problem.dtype, device=problem.q.device)
    for example, own in examples(problem):
        write_distances(example_blocks(own, example), distances)
    return distances


def examples(batch: MapProblem) -> Iterator[tuple[int, MapProblem]]:
    """Every example with the problem to take it from: the batch's, or one that repeats a short shared prefix."""
    repeated = None
    for example in range(batch.num_examples):
        prefix = batch.prefix_tokens(example)
        tokens = len(batch.example_rows[example]) + (batch.segments - 1) * prefix
        if prefix and batch.segments * prefix < LEAST_SHARE * tokens:
            repeated = batch.unshared() if repeated is None else repeated
            yield example, repeated
        else:
            yield example, batch


def write_distances(blocks: Iterable[Block], distances: Tensor, kept: deque[Maps] | None = None) -> None:
    """The row distances of blocks, in those of the batch; the maps of all chunks are appended to ``kept``, if given."""
    for block in blocks:
        for units in block.runs():
            chunk = Chunk(block, units, needs_grad=False)
            if kept is not None:
                kept.append(Maps(chunk.map, chunk.teachers))
            own = block.each_copy(distances[block.group], units)
            for rows, values in zip(own, chunk.distances(block.columns), strict=True):
                rows.copy_(values)


def distance_backward(coefficients: Tensor, problem: MapProblem) -> tuple[Tensor, Tensor]:
    """dq and dk for the incoming gradient of the row distances."""
    dq, dk = problem.zero_gradients(problem.q.dtype)
    for example, own in examples(problem):
        gradients = ExampleGradients(own, example, problem)
        add_gradients(example_blocks(own, example), coefficients, gradients)
        gradients.write(dq, dk)
    return dq, dk


def add_gradients(
    blocks: Iterable[Block], coefficients: Tensor, gradients: ExampleGradients, kept: deque[Maps] | None = None
) -> None:
    """The gradients of an example's blocks; coefficients (num_head_groups, total_units, segments).

    ``kept``: what ``write_distances`` kept of the same blocks; let go of, chunk by chunk.
    """
    for block in blocks:
        components = [block.whole()]
        block_dq, block_dk = block.gradient_buffers(components)
        for units in block.runs():
            chunk = Chunk(block, units, needs_grad=True, maps=kept and kept.popleft())
            d_map = chunk.map_gradient(block.each_copy(coefficients[block.group], units), block.columns)
            chunk.add_gradients(d_map, components, block_dq, block_dk, block.first_row)
        gradients.add(block, components[0], block_dq[0], block_dk[0])


def loss(problem: MapProblem, options: LossOptions) -> LossOutput:
    """The loss and, where asked for, its gradients, in one sweep.

    A row's coefficient is known as soon as its chunk is done, but for the factor that "frobenius" puts on a whole
    block: there the gradients of every block are kept apart (components) until its sum is known.
    """
    losses = torch.zeros(problem.segments, problem.segments, dtype=problem.dtype, device=problem.q.device)
    dq, dk = problem.zero_gradients(problem.gradient_dtype, options.needs_grad)
    weights = options.row_weights
    weights = losses.new_ones(problem.total_units) if weights is None else weights.to(problem.dtype)
    averaged = problem.num_head_groups * problem.num_examples
    rows = weights.new_zeros(problem.num_head_groups, problem.total_units, problem.segments)
    for example, own in examples(problem):
        gradients = ExampleGradients(own, example, problem) if options.needs_grad else None
        if own.shared_prefix(example):
            losses += two_sweeps(own, example, options, weights, rows, gradients)
        else:
            for block in example_blocks(own, example):
                losses[block.x] += sweep(block, options, weights, gradients) / averaged
        if gradients is not None:
            gradients.write(dq, dk)
    intra = losses.trace()
    inter = losses.fill_diagonal_(0).sum()
    return LossOutput(options.intra_weight * intra + options.inter_weight * inter, intra, inter, dq, dk)


def two_sweeps(
    problem: MapProblem,
    example: int,
    options: LossOptions,
    weights: Tensor,
    rows: Tensor,
    gradients: ExampleGradients | None,
) -> Tensor:
    """The losses of an example's blocks (segments, segments), mean over the head groups, and its gradients if wanted.

    rows (num_head_groups, total_units, segments) hold its distances, then d loss / d distance.
    """
    blocks = list(example_blocks(problem, example))
    kept = deque() if gradients is not None and keeps_maps(blocks, problem.workspace_bytes) else None
    write_distances(blocks, rows, kept)
    averaged = problem.num_head_groups * problem.num_examples
    losses = []
    for x, units in enumerate(problem.example_segments(example)):
        own = rows[:, units.start : units.stop].transpose(0, 1)  # (units, num_head_groups, segments)
        own_weights = weights[units.start : units.stop, None, None]
        block_losses = reduction.block_loss(options.reduction, own, own_weights)
        losses.append(block_losses.sum(0) / averaged)
        block_weights = losses[x].new_full((problem.segments,), options.inter_weight / averaged)
        block_weights[x] = options.intra_weight / averaged
        known = reduction.row_coefficients(options.reduction, own, own_weights, own_weights.sum(0))
        own.copy_(known * reduction.block_factor(options.reduction, block_losses) * block_weights)
    if gradients is not None:
        add_gradients(blocks, rows, gradients, kept)
    return torch.stack(losses)


def keeps_maps(blocks: Sequence[Block], workspace_bytes: int) -> bool:
    """Whether the maps of all chunks of some blocks, and what is live beside them, fit in the workspace."""
    tile = max((block.tile_bytes(units) for block in blocks for units in block.runs()), default=0)
    return sum(block.map_bytes() for block in blocks) + tile <= workspace_bytes


def sweep(block: Block, options: LossOptions, weights: Tensor, gradients: ExampleGradients | None) -> Tensor:
    """One sweep over a block's rows: the losses by key segment (segments,), and their gradients where asked for."""
    problem = block.problem
    rows = slice(block.rows.start, block.rows.stop)
    total_weight = weights[rows].sum()
    averaged = problem.num_head_groups * problem.num_examples
    block_weights = [
        (options.intra_weight if y == block.x else options.inter_weight) / averaged for y in range(problem.segments)
    ]
    if options.reduction == "frobenius":
        apart = [y for y, columns in enumerate(block.columns) if block_weights[y] and columns.start < columns.stop]
        components = [block.apart(y) for y in apart]
    else:
        components = [block.whole()] if any(block_weights) else []
    needs_grad = gradients is not None and bool(components)
    if needs_grad:
        dq, dk = block.gradient_buffers(components)

    def sweep_chunk(units: range) -> Tensor:
        """A chunk lives no longer than this call, so that its kept probabilities never meet the next one's."""
        chunk = Chunk(block, units, needs_grad)
        (distances,) = chunk.distances(block.columns)
        if needs_grad:
            chunk_weights = weights[units.start : units.stop, None]
            coefficients = reduction.row_coefficients(options.reduction, distances, chunk_weights, total_weight)
            d_map = chunk.map_gradient([coefficients], block.columns, block_weights)
            chunk.add_gradients(d_map, components, dq, dk, block.first_row)
        return distances

    distances = torch.cat([sweep_chunk(units) for units in block.runs()])
    losses = reduction.block_loss(options.reduction, distances, weights[rows, None])
    if needs_grad:
        if options.reduction == "frobenius":
            factors = reduction.block_factor(options.reduction, losses)
            for index, y in enumerate(apart):
                dq[index].mul_(factors[y])
                dk[index].mul_(factors[y])
        for component, component_dq, component_dk in zip(components, dq, dk, strict=True):
            gradients.add(block, component, component_dq, component_dk)
    return losses


def map_rows(problem: MapProblem, side: Attention, rows: Sequence[int]) -> list[Tensor]:
    """Unit rows of one side's U, each against all units of its example (num_head_groups, units).

    Consecutive rows of an example are computed together.
    """
    ends = [problem.example_segments(example)[-1].stop for example in range(problem.num_examples)]
    maps = []
    for example, own in itertools.groupby(rows, lambda row: bisect_right(ends, row)):
        groups = [GroupAttention(problem, side, example, group) for group in range(problem.num_head_groups)]
        for _, places in itertools.groupby(enumerate(own), lambda place: place[1] - place[0]):
            run = [row for _, row in places]
            merged = [group.merged_rows(range(run[0], run[-1] + 1)) for group in groups]
            maps += torch.stack(merged, dim=1)
    return maps
