"""The differences of a shared prefix's rows, summed over the segments that they are queries of: no product, no exp.

A gradient needs only sum_x c_xy D_xy of such a row, for all heads of a group alike. The sum is held as a difference is,
with the coefficient sum_x |c_xy|, so that it is no larger than the largest of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import (
    COLUMN,
    FIRST_TOKEN,
    ORIGIN,
    PART_UNIT,
    PREFIX,
    STRIDE,
    aligned_field,
    group_start,
    segment_field,
    segment_tokens,
    slab_row,
)


@triton.jit(
    do_not_specialize=[
        "first_tile",
        "first_unit",
        "last_unit",
        "first_group",
        "slab_origin",
        "slab_elements",
        "total_units",
    ]
)
def combination_bwd_kernel(
    difference,
    coefficients,
    combined,
    segment_table,
    unit_tiles,
    first_tile,
    first_unit,
    last_unit,
    first_group,
    slab_origin,
    slab_elements,
    total_units,
    SEGMENTS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has one unit tile, key segment and group; those of a prefix in its first segment have work to do.

    coefficients and combined (num_head_groups, total_units, segments). The sums take the place of the first segment's
    rows, in difference and in combined.
    """
    i_t = first_tile + tl.program_id(0)
    i_y = tl.program_id(1)
    i_g = tl.program_id(2)
    segment = tl.load(unit_tiles + i_t * 3).to(tl.int32)
    tile_first = tl.load(unit_tiles + i_t * 3 + 1).to(INDEX)
    tile_last = tl.load(unit_tiles + i_t * 3 + 2).to(INDEX)
    if (segment % SEGMENTS == 0) & (tile_first < segment_field(segment_table, segment, PART_UNIT, INDEX)):
        prefix_table = segment_table + PREFIX
        o_a = tile_first + tl.arange(0, BLOCK_M)
        m_a = (o_a < tile_last) & (o_a >= first_unit) & (o_a < last_unit)
        prefix_unit = segment_field(prefix_table, segment, PART_UNIT, INDEX)
        row = (o_a - prefix_unit) * aligned_field(prefix_table, segment, STRIDE, INDEX)
        row += group_start(i_g, slab_elements, INDEX)
        p_c = coefficients + tl.cast(first_group + i_g, INDEX) * total_units * SEGMENTS + i_y
        b_total = tl.zeros([BLOCK_M], dtype=tl.float32)
        for x in range(SEGMENTS):
            unit = o_a - prefix_unit + segment_field(prefix_table, segment + x, PART_UNIT, INDEX)
            b_total += tl.abs(tl.load(p_c + unit * SEGMENTS, mask=m_a, other=0.0))
        p_o = combined + (tl.cast(first_group + i_g, INDEX) * total_units + o_a) * SEGMENTS + i_y
        tl.store(p_o, b_total, mask=m_a)
        # A segment's columns end where its own last tile does; past the last keys of a part there is room for it.
        own_first, own_last = segment_tokens(segment_table, segment + i_y, FIRST_TOKEN, INDEX)
        first = aligned_field(prefix_table, segment + i_y, COLUMN, INDEX)
        last = aligned_field(segment_table, segment + i_y, COLUMN, INDEX) + own_last - own_first
        for j in range(first, last, BLOCK_N):
            o_j = j + tl.arange(0, BLOCK_N)
            b_e = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for x in range(SEGMENTS):
                unit = o_a - prefix_unit + segment_field(prefix_table, segment + x, PART_UNIT, INDEX)
                b_c = tl.load(p_c + unit * SEGMENTS, mask=m_a, other=0.0)
                b_c = tl.where(b_total > 0, b_c / tl.where(b_total > 0, b_total, 1.0), 0.0)
                o_d = row + slab_row(prefix_table, segment + x, slab_origin, ORIGIN, INDEX)
                b_d = tl.load(difference + o_d[:, None] + o_j[None, :], mask=m_a[:, None], other=0.0)
                b_e += b_d.to(tl.float32) * b_c[:, None]
            o_d = row + slab_row(prefix_table, segment, slab_origin, ORIGIN, INDEX)
            p_e = difference + o_d[:, None] + o_j[None, :]
            tl.store(p_e, b_e.to(difference.dtype.element_ty), mask=m_a[:, None])
