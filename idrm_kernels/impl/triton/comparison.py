"""Student's minus teacher's map by unit, from rows staged by ``head_mean`` or stored maps: no product, no exp.

Columns stay the student's tokens: the gradient kernels read a row's columns as they read keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.difference import compared
from idrm_kernels.impl.triton.primitives import (
    COLUMN,
    FIRST_TOKEN,
    FIRST_UNIT,
    ORIGIN,
    PART_UNIT,
    RUN_TOKENS,
    SEGMENT_FIELDS,
    SLOT_ORIGIN,
    STRIDE,
    TEACHER_COLUMN,
    TEACHER_SLOT_ORIGIN,
    TEACHER_WIDTH,
    WIDTH,
    aligned_field,
    group_start,
    part_table,
    segment_field,
    segment_tokens,
    slab_row,
)


@triton.jit
def merged_columns(
    staged,
    i_g,
    staged_origin,
    staged_elements,
    segment_table,
    query_segment,
    key_segment,
    key_table,
    slots,
    unit_offsets,
    o_a,
    m_a,
    o_b,
    m_b,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ORIGINS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """U of units o_a and o_b [BLOCK_M, BLOCK_N]: a unit's columns summed, its rows averaged, in the tokens' order.

    key_table has the column of the keys and, by the field UNITS, the unit that it belongs to.
    """
    slot = tl.load(slots + o_a, mask=m_a, other=0)
    row_tokens = (
        tl.load(unit_offsets + o_a + 1, mask=m_a, other=1) - tl.load(unit_offsets + o_a, mask=m_a, other=0)
    ).to(tl.int32)
    pieces = tl.where(m_a, tl.cdiv(row_tokens, RUN_TOKENS), 0)
    b_first = tl.load(unit_offsets + o_b, mask=m_b, other=0)
    tokens = (tl.load(unit_offsets + o_b + 1, mask=m_b, other=0) - b_first).to(tl.int32)
    width = aligned_field(segment_table, query_segment, WIDTHS, INDEX)
    segment_slot = tl.load(slots + tl.load(segment_table + query_segment * SEGMENT_FIELDS + FIRST_UNIT))
    origin = slab_row(segment_table, query_segment, staged_origin, ORIGINS, INDEX)
    origin += group_start(i_g, staged_elements, INDEX) + aligned_field(key_table, key_segment, COLUMNS, INDEX)
    row = origin + (slot - segment_slot).to(INDEX) * width
    first_unit = tl.load(key_table + key_segment * SEGMENT_FIELDS + UNITS)
    column = (b_first - tl.load(unit_offsets + first_unit)).to(INDEX)
    b_u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for piece in range(tl.max(pieces)):
        for token in range(tl.max(tokens)):
            p_u = staged + (row + piece * width)[:, None] + (column + token)[None, :]
            b_u += tl.load(p_u, mask=(piece < pieces)[:, None] & (token < tokens)[None, :], other=0.0)
    return b_u / row_tokens.to(tl.float32)[:, None]


@triton.jit(
    do_not_specialize=[
        "staged_origin",
        "staged_elements",
        "teacher_staged_origin",
        "teacher_staged_elements",
        "max_units",
        "num_groups",
        "first_tile",
        "first_unit",
        "last_unit",
        "first_group",
        "slab_origin",
        "slab_elements",
        "total_units",
    ]
)
def comparison_fwd_kernel(
    staged,
    staged_origin,
    staged_elements,
    slots,
    unit_offsets,
    teacher_staged,
    teacher_staged_origin,
    teacher_staged_elements,
    teacher_slots,
    teacher_unit_offsets,
    maps,
    max_units,
    num_groups,
    difference,
    distances,
    units,
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
    SHARED: tl.constexpr,
    METRIC: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has one unit tile, key segment and group, and goes through the columns.

    difference (groups, unit rows of the slab, columns) and distances (num_head_groups, total_units, segments) as in
    ``difference_fwd_kernel``; either may be None.
    """
    i_t = first_tile + tl.program_id(0)
    i_y = tl.program_id(1)
    i_g = tl.program_id(2)
    query_segment = tl.load(unit_tiles + i_t * 3).to(tl.int32)
    tile_first = tl.load(unit_tiles + i_t * 3 + 1).to(INDEX)
    tile_last = tl.load(unit_tiles + i_t * 3 + 2).to(INDEX)
    example_segment = query_segment // SEGMENTS * SEGMENTS
    key_segment = example_segment + i_y
    query_table = segment_table
    if SHARED:
        own_unit = segment_field(segment_table, query_segment, PART_UNIT, INDEX)
        query_table = part_table(segment_table, tl.where(tile_first < own_unit, SEGMENTS, 1), SHARED)
    o_a = tile_first + tl.arange(0, BLOCK_M)
    m_a = (o_a < tile_last) & (o_a >= first_unit) & (o_a < last_unit)
    b_d = tl.zeros([BLOCK_M], dtype=tl.float32)
    for part in range(1 + SHARED):
        key_table = part_table(segment_table, 1 + SHARED - part, SHARED)
        first, last = segment_tokens(key_table, key_segment, FIRST_TOKEN, INDEX)
        key_unit = segment_field(key_table, key_segment, PART_UNIT, INDEX)
        first_token = tl.load(unit_offsets + key_unit)
        unit_shift = 0
        if SHARED:
            # The tokens of a prefix have the units of the first segment.
            shift = key_unit - segment_field(key_table, example_segment, PART_UNIT, INDEX)
            unit_shift = tl.where(part == 0, shift, 0)
        for j in range(first, last, BLOCK_N):
            o_j = j + tl.arange(0, BLOCK_N)
            m_j = o_j < last
            o_b = tl.load(units + o_j, mask=m_j, other=0) + unit_shift
            b_s = merged_columns(
                staged,
                i_g,
                staged_origin,
                staged_elements,
                segment_table,
                query_segment,
                key_segment,
                key_table,
                slots,
                unit_offsets,
                o_a,
                m_a,
                o_b,
                m_j,
                PART_UNIT,
                COLUMN,
                WIDTH,
                SLOT_ORIGIN,
                INDEX,
                BLOCK_M,
                BLOCK_N,
            )
            if maps is None:
                b_t = merged_columns(
                    teacher_staged,
                    i_g,
                    teacher_staged_origin,
                    teacher_staged_elements,
                    segment_table,
                    query_segment,
                    key_segment,
                    segment_table,
                    teacher_slots,
                    teacher_unit_offsets,
                    o_a,
                    m_a,
                    o_b,
                    m_j,
                    FIRST_UNIT,
                    TEACHER_COLUMN,
                    TEACHER_WIDTH,
                    TEACHER_SLOT_ORIGIN,
                    INDEX,
                    BLOCK_M,
                    BLOCK_N,
                )
            else:
                example_first = segment_field(segment_table, example_segment, FIRST_UNIT, INDEX)
                map_row = (example_segment // SEGMENTS * num_groups + first_group + i_g).to(INDEX) * max_units + o_a
                map_row = (map_row - example_first) * max_units
                p_t = maps + map_row[:, None] + (o_b.to(INDEX) - example_first)[None, :]
                b_t = tl.load(p_t, mask=m_a[:, None] & m_j[None, :], other=0.0).to(tl.float32)
            terms, derivative = compared(b_s, b_t, METRIC)  # [BLOCK_M, BLOCK_N]
            if difference is not None:
                first_row = segment_field(query_table, query_segment, PART_UNIT, INDEX)
                p_a = (o_a - first_row) * aligned_field(query_table, query_segment, STRIDE, INDEX)
                p_a += slab_row(query_table, query_segment, slab_origin, ORIGIN, INDEX)
                p_a += group_start(i_g, slab_elements, INDEX) - first
                p_a += aligned_field(key_table, key_segment, COLUMN, INDEX)
                p_d = difference + p_a[:, None] + o_j[None, :]
                tl.store(p_d, (derivative * FACTOR).to(difference.dtype.element_ty), mask=m_a[:, None] & m_j[None, :])
            if distances is not None:
                # A unit counts once, at its first token.
                m_b = m_j & (o_j - first == tl.load(unit_offsets + o_b, mask=m_j, other=-1) - first_token)
                b_d += tl.sum(tl.where(m_b[None, :], terms, 0.0), 1)
    if distances is not None:
        p_o = distances + (tl.cast(first_group + i_g, INDEX) * total_units + o_a) * SEGMENTS + i_y
        tl.store(p_o, tl.maximum(b_d, 0.0), mask=m_a)
