"""A problem on its device: its plan, its softmax denominators, and every launch over a slab of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from idrm_kernels.impl.problem import LossOptions, MapProblem
from idrm_kernels.impl.triton import launch
from idrm_kernels.impl.triton.block_loss import block_loss_fwd_kernel, total_loss_fwd_kernel
from idrm_kernels.impl.triton.combination import combination_bwd_kernel
from idrm_kernels.impl.triton.comparison import comparison_fwd_kernel
from idrm_kernels.impl.triton.configurations import (
    ARITHMETIC,
    COMPARISON,
    Configuration,
    architecture,
    launch_configured,
)
from idrm_kernels.impl.triton.difference import difference_fwd_kernel, row_distance_fwd_kernel
from idrm_kernels.impl.triton.head_mean import head_mean_fwd_kernel
from idrm_kernels.impl.triton.key_gradient import key_gradient_bwd_kernel
from idrm_kernels.impl.triton.launch import Side
from idrm_kernels.impl.triton.logsumexp import logsumexp_fwd_kernel
from idrm_kernels.impl.triton.plan import Plan, Slab, Staging
from idrm_kernels.impl.triton.query_gradient import query_gradient_bwd_kernel
from idrm_kernels.tiles import RUN_TOKENS, TILE_SIZES, UNIT_TILE, ExampleField, Section, SegmentField

# Differences of probabilities wait in float16 times this, to stay clear of its smallest normal number.
DIFFERENCE_SCALE = 2.0**14
# Rows, and blocks, that a program of the small kernels takes at a time.
BLOCK_LOSS_ROWS = 1024


class Batch:
    """A problem's tensors, plan and softmax denominators, and the launches over a slab of it.

    Attributes:
        is_fused: a unit is a token on both sides and no position bias asks for small tiles, so that the maps are
            compared in registers.
        difference_dtype, difference_scale: how the differences of a slab are held for the gradient kernels.
    """

    def __init__(self, problem: MapProblem, arch: str | None = None, run: Callable = launch.run):
        self.problem = problem
        self.run = run
        self.plan = Plan.of(problem)
        self.student = Side.student(problem)
        self.teacher = Side.teacher(problem) if problem.maps is None else None
        self.maps = None if problem.maps is None else problem.maps.contiguous()
        self.arch = architecture(problem.q.device) if arch is None else arch
        self.student_is_merged = int(problem.unit_offsets[-1]) != problem.total_units
        self.teacher_is_merged = self.teacher is not None and self.teacher.q.shape[0] != problem.total_units
        has_bias = self.teacher is not None and self.teacher.has_bias
        self.is_fused = not (self.student_is_merged or self.teacher_is_merged or has_bias)
        half = problem.q.dtype != torch.float32 and problem.metric == "l2"
        self.difference_dtype = torch.float16 if half else torch.float32
        self.difference_scale = DIFFERENCE_SCALE if half else 1.0
        # Where only distances are made, an element takes but its share of a partial sum; and where a slab begins inside
        # a range of tokens, offsets count from the range's first row.
        elements = problem.workspace_bytes * min(TILE_SIZES) // 4
        elements = min(elements, self.plan.total_elements * problem.num_head_groups)
        self.index = launch.index_type(problem, max(elements, self.plan.largest_range))
        self.is_joint = problem.normalization == "joint"
        self.block_examples = triton.next_power_of_2(max(2, problem.num_examples))
        self.segment_table = self.section(Section.SEGMENTS)
        self.example_table = self.section(Section.EXAMPLES)
        self.statistics = self.denominators(self.student)
        self.teacher_statistics = None if self.teacher is None else self.denominators(self.teacher)

    def launch(
        self,
        kernel: str,
        sides: list[Side],
        run: Callable[[Configuration], None],
        is_shared: bool,
        repeats: bool = True,
    ) -> None:
        """Runs a launch in the configuration of a kernel that reads some sides.

        ``is_shared``: the student's tokens have prefixes that segments share; ``repeats``: it may run again.
        """
        head_dim = max(side.head_dim for side in sides)
        arithmetic = max((side.arithmetic for side in sides), key=ARITHMETIC.index)
        kernel += " with bias" if any(side.has_bias for side in sides) else ""
        if self.problem.metric == "kl" and kernel in ("difference", "query_gradient", "key_gradient"):
            kernel += " kl"
        kernel += " shared" if is_shared else ""
        launch_configured(kernel, head_dim, arithmetic, self.arch, run, repeats)

    def section(self, section: Section) -> Tensor:
        """A section of the plan on the device."""
        return self.problem.device_plan[self.plan.bounds[section]]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor beside q."""
        return torch.empty(shape, dtype=dtype, device=self.problem.q.device)

    def denominators(self, side: Side) -> dict:
        """The statistics of every softmax (supports, num_heads, tokens), as kernels take them."""
        tokens = side.q.shape[0]
        shape = (1 if self.is_joint else self.problem.segments, side.num_heads, tokens)
        statistics = {"logsumexp": self.empty(*shape), "row_maximum": self.empty(*shape) if side.is_exact else None}

        def launch(tiles: Callable[[int], range], is_shared: bool) -> None:
            def run(own: Configuration) -> None:
                covered = tiles(own.block_m)
                self.run(
                    logsumexp_fwd_kernel,
                    (len(covered) * side.num_heads,),
                    **side.operands(own, self.arch),
                    **side.bias(),
                    **statistics,
                    scale=side.score_scale,
                    segment_table=self.segment_table,
                    row_tiles=self.section(side.rows[own.block_m]),
                    first_tile=covered.start,
                    total_tokens=tokens,
                    SEGMENTS=self.problem.segments,
                    TOKENS=side.first_token,
                    SHARED=is_shared,
                    JOINT=self.is_joint,
                    INDEX=self.index,
                    **side.shape(),
                    **own.options,
                )

            self.launch("logsumexp", [side], run, is_shared)

        if side.is_teacher:
            launch(lambda size: range(self.section(side.rows[size]).numel() // 3), False)
        else:
            for examples, is_shared in self.plan.alike:
                own_tokens = self.plan.tokens(examples)
                if own_tokens:
                    launch(functools.partial(self.plan.row_tiles, own_tokens), is_shared)
        return statistics

    def slabs(self, needs_difference: bool, needs_distances: bool) -> list[Slab]:
        """The slabs of a sweep that makes differences, distances or both."""
        element_bytes = self.difference_dtype.itemsize if needs_difference else 0
        workspace_bytes = self.problem.workspace_bytes
        if self.is_fused:
            element_bytes += 4 / min(TILE_SIZES) if needs_distances else 0
        elif needs_difference:
            workspace_bytes //= 2
        return self.plan.slabs(self.problem.num_head_groups, element_bytes, workspace_bytes)

    def compare(self, slab: Slab, needs_difference: bool, distances: Tensor | None) -> Tensor | None:
        """The differences of a slab's maps (groups, elements), and its rows' distances written where they are asked."""
        difference = None
        if needs_difference:
            difference = self.empty(len(slab.groups), slab.elements, dtype=self.difference_dtype)
        if self.is_fused:
            self.compare_tokens(slab, difference, distances)
        else:
            workspace_bytes = self.problem.workspace_bytes
            groups_at_once = len(slab.groups)
            if needs_difference:
                workspace_bytes -= workspace_bytes // 2
            else:
                # Nothing else has cut the groups: as many as a tile of units has room for.
                widths = (SegmentField.WIDTH, SegmentField.TEACHER_WIDTH)
                widest = max(sum(segment[width] for width in widths) for segment in self.plan.segments)
                groups_at_once = max(1, min(groups_at_once, workspace_bytes // (4 * UNIT_TILE * widest)))
            for first in range(slab.groups.start, slab.groups.stop, groups_at_once):
                part = slab._replace(groups=range(first, min(first + groups_at_once, slab.groups.stop)))
                staged = None
                for staging in self.plan.stagings(part, workspace_bytes):
                    if not staging.is_staged:
                        # Before the next rows are made: one piece's at a time.
                        staged = None
                        place = (staging.slots, staging.origin, staging.elements)
                        staged = self.head_means(self.student, self.statistics, part, *place)
                    self.compare_units(part, staging, staged, difference, distances)
        return difference

    def place(self, slab: Slab) -> dict:
        """Where a slab lies, as kernels take it."""
        return {
            "segment_table": self.segment_table,
            "first_group": slab.groups.start,
            "slab_origin": slab.origin,
            "slab_elements": slab.elements,
            "SEGMENTS": self.problem.segments,
            "SHARED": slab.is_shared,
            "INDEX": self.index,
        }

    def stored_maps(self) -> dict:
        """The teacher's stored maps as kernels take them; None where its maps are computed."""
        return {
            "maps": self.maps,
            "max_units": 0 if self.maps is None else self.maps.shape[-1],
            "num_groups": self.problem.num_head_groups,
        }

    def compare_tokens(self, slab: Slab, difference: Tensor | None, distances: Tensor | None) -> None:
        """Both maps tile by tile in registers."""
        student, num_groups = self.student, self.problem.num_head_groups
        # With stored maps the student's tensors stand in for the teacher's; the kernel is compiled without them.
        teacher = student if self.teacher is None else self.teacher

        def run(own: Configuration) -> None:
            rows = ExampleField[f"ROWS_{own.block_m}"]
            pairs = ExampleField[f"PAIRS_{own.block_m}_{own.block_n}"]
            tiles = self.plan.row_tiles(slab.tokens, own.block_m)
            covered = self.plan.pairs(tiles, slab.examples, rows, pairs)
            partial_distances = None
            if distances is not None:
                partial_distances = self.empty(len(slab.groups), slab.elements // own.block_n)
            of_teacher = {
                **teacher.operands(own, self.arch),
                **(self.teacher_statistics or self.statistics),
                "scale": teacher.score_scale,
            }
            self.run(
                difference_fwd_kernel,
                (len(covered), len(slab.groups)),
                **student.operands(own, self.arch),
                **self.statistics,
                scale=student.score_scale,
                total_tokens=student.q.shape[0],
                total_units=self.problem.total_units,
                **{f"teacher_{name}": value for name, value in of_teacher.items()},
                **{f"TEACHER_{name}": value for name, value in teacher.shape(num_groups).items()},
                **self.stored_maps(),
                difference=difference,
                partial_distances=partial_distances,
                example_table=self.example_table,
                num_examples=self.problem.num_examples,
                row_tiles=self.section(student.rows[own.block_m]),
                first_pair=covered.start,
                first_row=slab.tokens.start,
                last_row=slab.tokens.stop,
                ROWS=int(rows),
                PAIRS=int(pairs),
                JOINT=self.is_joint,
                METRIC=self.problem.metric,
                FACTOR=self.difference_scale,
                BLOCK_EXAMPLES=self.block_examples,
                **self.place(slab),
                **student.shape(num_groups),
                **own.options,
            )
            if distances is not None:
                tiles = self.plan.row_tiles(slab.tokens, RUN_TOKENS)
                self.run(
                    row_distance_fwd_kernel,
                    (len(tiles), self.problem.segments, len(slab.groups)),
                    partial_distances=partial_distances,
                    distances=distances,
                    row_tiles=self.section(Section.ROWS_64),
                    first_tile=tiles.start,
                    first_row=slab.tokens.start,
                    last_row=slab.tokens.stop,
                    total_units=self.problem.total_units,
                    BLOCK_M=RUN_TOKENS,
                    BLOCK_N=own.block_n,
                    **self.place(slab),
                )

        self.launch("difference", [student, teacher], run, slab.is_shared)

    def compare_units(
        self, slab: Slab, staging: Staging, staged: Tensor, difference: Tensor | None, distances: Tensor | None
    ) -> None:
        """The student's staged rows, and the teacher's, merged and compared."""
        problem = self.problem
        teacher_staged = None
        if self.teacher is not None:
            teacher_staged = self.head_means(
                self.teacher,
                self.teacher_statistics,
                slab,
                staging.teacher_slots,
                staging.teacher_origin,
                staging.teacher_elements,
            )
        self.run(
            comparison_fwd_kernel,
            (len(staging.tiles), problem.segments, len(slab.groups)),
            staged=staged,
            staged_origin=staging.origin,
            staged_elements=staging.elements,
            slots=self.section(Section.SLOTS),
            unit_offsets=problem.device_unit_offsets,
            teacher_staged=teacher_staged,
            teacher_staged_origin=staging.teacher_origin,
            teacher_staged_elements=staging.teacher_elements,
            teacher_slots=self.section(Section.TEACHER_SLOTS),
            teacher_unit_offsets=problem.teacher_device_unit_offsets,
            **self.stored_maps(),
            difference=difference,
            distances=distances,
            units=self.section(Section.UNITS),
            unit_tiles=self.section(Section.UNIT_TILES),
            first_tile=staging.tiles.start,
            first_unit=staging.units.start,
            last_unit=staging.units.stop,
            total_units=problem.total_units,
            METRIC=problem.metric,
            FACTOR=self.difference_scale,
            **self.place(slab),
            **COMPARISON.options,
        )

    def head_means(self, side: Side, statistics: dict, slab: Slab, slots: range, origin: int, elements: int) -> Tensor:
        """(groups, elements): rows of slots, columns of tokens."""
        prefix = "TEACHER_" if side.is_teacher else ""
        is_shared = slab.is_shared and not side.is_teacher
        runs = self.plan.runs(slots, Section[f"{prefix}RUNS"])
        staged = self.empty(len(slab.groups), elements)

        def run(own: Configuration) -> None:
            pairs = ExampleField[f"{prefix}RUN_PAIRS_{own.block_n}"]
            covered = self.plan.pairs(runs, slab.examples, ExampleField[f"{prefix}RUNS"], pairs)
            self.run(
                head_mean_fwd_kernel,
                (len(covered), len(slab.groups)),
                **side.operands(own, self.arch),
                **side.bias(),
                **statistics,
                scale=side.score_scale,
                total_tokens=side.q.shape[0],
                staged=staged,
                segment_table=self.segment_table,
                example_table=self.example_table,
                num_examples=self.problem.num_examples,
                runs=self.section(Section[f"{prefix}RUNS"]),
                units=self.section(Section[f"{prefix}UNITS"]),
                slots=self.section(Section[f"{prefix}SLOTS"]),
                first_pair=covered.start,
                first_slot=slots.start,
                last_slot=slots.stop,
                first_group=slab.groups.start,
                staged_origin=origin,
                staged_elements=elements,
                SEGMENTS=self.problem.segments,
                PAIRS=int(pairs),
                SHARED=is_shared,
                JOINT=self.is_joint,
                MERGED=self.teacher_is_merged if side.is_teacher else self.student_is_merged,
                INDEX=self.index,
                BLOCK_EXAMPLES=self.block_examples,
                **side.staging,
                **side.shape(self.problem.num_head_groups),
                **own.options,
            )

        self.launch("head_mean", [side], run, is_shared)
        return staged

    def block_losses(
        self, slab: Slab, options: LossOptions, distances: Tensor, losses: Tensor, coefficients: Tensor | None
    ) -> None:
        """The losses of a slab's blocks, and the derivatives of the whole loss by its rows' distances."""
        problem = self.problem
        self.run(
            block_loss_fwd_kernel,
            (len(slab.segments), problem.segments, len(slab.groups)),
            distances=distances,
            row_weights=options.row_weights,
            losses=losses,
            coefficients=coefficients,
            segment_table=self.segment_table,
            first_segment=slab.segments.start,
            first_group=slab.groups.start,
            num_segments=losses.shape[1],
            total_units=problem.total_units,
            intra_weight=options.intra_weight,
            inter_weight=options.inter_weight,
            averaged=problem.num_head_groups * problem.num_examples,
            SEGMENTS=problem.segments,
            REDUCTION=options.reduction,
            INDEX=self.index,
            BLOCK_M=BLOCK_LOSS_ROWS,
        )

    def total_loss(self, options: LossOptions, losses: Tensor) -> list[Tensor]:
        """The scalars loss, intra and inter."""
        scalars = [self.empty() for _ in range(3)]
        self.run(
            total_loss_fwd_kernel,
            (1,),
            losses=losses,
            **dict(zip(("loss", "intra", "inter"), scalars, strict=True)),
            num_blocks=losses.numel(),
            num_segments=losses.shape[1],
            intra_weight=options.intra_weight,
            inter_weight=options.inter_weight,
            averaged=self.problem.num_head_groups * self.problem.num_examples,
            SEGMENTS=self.problem.segments,
            BLOCK=BLOCK_LOSS_ROWS,
        )
        return scalars

    def gradients(self, slab: Slab, difference: Tensor, coefficients: Tensor, gradients: Gradients) -> None:
        """dq of the slab's rows and groups, and their part of dk."""
        side, problem = self.student, self.problem
        heads = side.num_heads // problem.num_head_groups
        shared = {
            **self.statistics,
            "scale": side.score_scale,
            "softmax_scale": side.softmax_scale,
            "delta": gradients.delta,
            "total_tokens": side.q.shape[0],
            "difference": difference,
            "coefficients": gradients.token_coefficients(slab, difference, coefficients),
            "units": gradients.units,
            "first_row": slab.tokens.start,
            "last_row": slab.tokens.stop,
            "JOINT": self.is_joint,
            "SCALED": 1 / self.difference_scale if problem.q.dtype == torch.float16 else 0.0,
            "FACTOR": (2 if problem.metric == "l2" else 1) / (heads * self.difference_scale),
            **self.place(slab),
            **side.shape(problem.num_head_groups),
        }

        def run_queries(own: Configuration) -> None:
            tiles = self.plan.row_tiles(slab.tokens, own.block_m)
            self.run(
                query_gradient_bwd_kernel,
                (len(tiles) * heads * len(slab.groups),),
                **side.operands(own, self.arch),
                dq=gradients.dq,
                row_tiles=self.section(side.rows[own.block_m]),
                first_tile=tiles.start,
                num_heads_of_slab=heads * len(slab.groups),
                **shared,
                **own.options,
            )

        keys = self.plan.tokens(slab.examples)
        partial_dk = gradients.partial_dk(slab, len(keys))

        def run_keys(own: Configuration) -> None:
            tiles = self.plan.row_tiles(keys, own.block_n)
            self.run(
                key_gradient_bwd_kernel,
                (len(tiles) * side.k.shape[1],),
                **side.operands(own, self.arch),
                dk=gradients.dk,
                partial_dk=partial_dk,
                partial_first=keys.start,
                key_tiles=self.section(side.rows[own.block_n]),
                first_tile=tiles.start,
                last_group=slab.groups.stop,
                BEGINS=slab.begins,
                ENDS=slab.ends,
                **shared,
                **own.options,
            )

        self.launch("query_gradient", [side], run_queries, slab.is_shared)
        self.launch("key_gradient", [side], run_keys, slab.is_shared, repeats=slab.begins)

    def combine(self, slab: Slab, difference: Tensor, coefficients: Tensor, combined: Tensor) -> None:
        """The differences of shared rows and their coefficients, summed over the segments in place of the first's."""
        tiles = self.plan.tiles_of(slab.units)
        self.run(
            combination_bwd_kernel,
            (len(tiles), self.problem.segments, len(slab.groups)),
            difference=difference,
            coefficients=coefficients,
            combined=combined,
            segment_table=self.segment_table,
            unit_tiles=self.section(Section.UNIT_TILES),
            first_tile=tiles.start,
            first_unit=slab.units.start,
            last_unit=slab.units.stop,
            first_group=slab.groups.start,
            slab_origin=slab.origin,
            slab_elements=slab.elements,
            total_units=self.problem.total_units,
            SEGMENTS=self.problem.segments,
            INDEX=self.index,
            **COMPARISON.options,
        )


class Gradients:
    """dq and dk of a batch, the deltas between them, and dk so far of an example that has several slabs.

    Attributes:
        dq, dk: as q and k.
        delta: (supports, num_heads, total_tokens) float32.
        units: the unit of every token; None where a unit is a token.
    """

    def __init__(self, batch: Batch, dtype: torch.dtype):
        self.dq, self.dk = (torch.empty_like(side, dtype=dtype) for side in (batch.student.q, batch.student.k))
        self.delta = torch.empty_like(batch.statistics["logsumexp"])
        self.units = batch.section(Section.UNITS) if batch.student_is_merged else None
        self._batch, self._partial_dk = batch, None
        problem = batch.problem
        self._by_token = self._combined = None
        if batch.student_is_merged or problem.token_index is not None:
            self._by_token = batch.empty(problem.num_head_groups, len(self.dq), problem.segments)
            self._unit_tokens = problem.device_unit_offsets.diff()[:, None]
        if problem.token_index is not None:
            self._combined = batch.empty(problem.num_head_groups, problem.total_units, problem.segments)

    def token_coefficients(self, slab: Slab, difference: Tensor, coefficients: Tensor) -> Tensor:
        """(num_head_groups, total_tokens, segments): in the rows of the slab, a unit's coefficients by its tokens.

        Where a prefix is shared, its rows of the difference and their coefficients are summed over the segments first.
        """
        if self._by_token is None:
            return coefficients
        groups, rows, units = (slice(own.start, own.stop) for own in (slab.groups, slab.tokens, slab.units))
        if slab.is_shared:
            self._combined[groups, units] = coefficients[groups, units]
            self._batch.combine(slab, difference, coefficients, self._combined)
            coefficients = self._combined
        units = self._batch.section(Section.UNITS)[rows]
        self._by_token[groups, rows] = coefficients[groups, units] / self._unit_tokens[units]
        return self._by_token

    def partial_dk(self, slab: Slab, tokens: int) -> Tensor:
        """(tokens of the example, num_kv_heads, head_dim) float32; any tensor where the slab needs none."""
        if slab.begins and slab.ends:
            return self.dk
        if slab.begins:
            self._partial_dk = self.dk.new_empty((tokens, *self.dk.shape[1:]), dtype=torch.float32)
        return self._partial_dk
