"""Student's minus teacher's map where a unit is a token on both sides: no map of either leaves the registers.

1 product and 1 exp an element and head, of both models; of the student where segments share a prefix, once for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.head_mean import mean_probabilities
from idrm_kernels.impl.triton.primitives import (
    COLUMN,
    FIRST_TOKEN,
    FIRST_UNIT,
    ORIGIN,
    PART_UNIT,
    STRIDE,
    aligned_field,
    chosen,
    group_start,
    pair_of,
    part_table,
    segment_field,
    segment_tokens,
    segments_of,
    slab_row,
)


@triton.jit
def compared(b_student, b_teacher, METRIC: tl.constexpr):
    """The terms of a row distance and its derivatives by the student's map (DESIGN sections 2 and 2.1).

    The l2 derivative lacks its factor 2.
    """
    if METRIC == "l2":
        derivative = b_student - b_teacher
        terms = derivative * derivative
    else:
        quotient = b_teacher / tl.maximum(b_student, 1e-30)
        terms = b_teacher * tl.log(tl.where(quotient > 0, quotient, 1.0)) + (b_student - b_teacher)
        # Where the maps are close the two cancel: r - log(1 + r) by its series, of r = student / teacher - 1.
        r = (b_student - b_teacher) / tl.maximum(b_teacher, 1e-30)
        series = 0.5 + r * (-1.0 / 3 + r * (0.25 + r * (-0.2 + r * (1.0 / 6))))
        terms = tl.where(tl.abs(r) < 0.0625, b_teacher * r * r * series, terms)
        derivative = 1.0 - tl.where(b_student > 1e-30, quotient, 0.0)
    return terms, derivative


@triton.jit(
    do_not_specialize=[
        "total_tokens",
        "total_units",
        "max_units",
        "num_groups",
        "num_examples",
        "first_pair",
        "first_row",
        "last_row",
        "first_group",
        "slab_origin",
        "slab_elements",
    ]
)
def difference_fwd_kernel(
    q,
    k,
    q_descriptor,
    k_descriptor,
    scale,
    logsumexp,
    row_maximum,
    total_tokens,
    total_units,
    teacher_q,
    teacher_k,
    teacher_q_descriptor,
    teacher_k_descriptor,
    teacher_scale,
    teacher_logsumexp,
    teacher_row_maximum,
    maps,
    max_units,
    num_groups,
    difference,
    partial_distances,
    segment_table,
    example_table,
    num_examples,
    row_tiles,
    first_pair,
    first_row,
    last_row,
    first_group,
    slab_origin,
    slab_elements,
    SEGMENTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_NUM_HEADS: tl.constexpr,
    TEACHER_NUM_KV_HEADS: tl.constexpr,
    TEACHER_HEADS: tl.constexpr,
    TEACHER_HEAD_DIM: tl.constexpr,
    TEACHER_CAUSAL: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    JOINT: tl.constexpr,
    METRIC: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TEACHER_BLOCK_D: tl.constexpr,
):
    """A program has one row tile, column tile and group, in every segment that they lie in.

    difference (groups, rows of the slab, columns), the derivatives times FACTOR; None where nothing needs them.
    partial_distances: the same with a column for a column tile, its share of the row distances; or None.
    """
    example, row_tile, key_segment, key_table, column_tile = pair_of(
        segment_table,
        example_table,
        num_examples,
        first_pair + tl.program_id(0),
        SEGMENTS,
        PAIRS,
        ROWS,
        FIRST_TOKEN,
        SHARED,
        BLOCK_N,
        BLOCK_EXAMPLES,
    )
    i_g = tl.program_id(1)
    query_segment = tl.load(row_tiles + row_tile * 3).to(tl.int32)
    q_first = tl.load(row_tiles + row_tile * 3 + 1).to(INDEX)
    q_last = tl.load(row_tiles + row_tile * 3 + 2).to(INDEX)
    key_first, key_last = segment_tokens(key_table, key_segment, FIRST_TOKEN, INDEX)
    k_first = key_first + column_tile * BLOCK_N
    num_queries = segments_of(segment_table, query_segment, q_first, SEGMENTS, SHARED)
    num_keys = segments_of(segment_table, key_segment, k_first, SEGMENTS, SHARED)
    query_table = part_table(segment_table, num_queries, SHARED)
    support = key_segment - example * SEGMENTS
    if JOINT:
        support = support * 0
    SUPPORTS: tl.constexpr = SEGMENTS if SHARED and not JOINT else 1
    o_i = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    m_j = o_j < key_last - k_first
    row = q_first + o_i
    m_i = (row < q_last) & (row >= first_row) & (row < last_row)
    student = mean_probabilities(
        q,
        k,
        q_descriptor,
        k_descriptor,
        None,
        None,
        None,
        None,
        0,
        0,
        tl.cast(scale, tl.float32),
        logsumexp,
        row_maximum,
        total_tokens,
        q_first,
        q_last,
        k_first,
        key_last,
        support,
        num_keys,
        first_group + i_g,
        NUM_HEADS,
        NUM_KV_HEADS,
        HEADS,
        HEAD_DIM,
        CAUSAL,
        SUPPORTS,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    range_row = segment_field(query_table, query_segment, FIRST_TOKEN, INDEX)
    for pair in range(num_queries * num_keys):
        x = query_segment + pair // num_keys
        y = pair % num_keys
        # Units are tokens, the teacher's too.
        q_unit = segment_field(query_table, x, PART_UNIT, INDEX) + q_first - range_row
        k_unit = segment_field(key_table, key_segment + y, PART_UNIT, INDEX) + k_first - key_first
        if maps is None:
            b_t = mean_probabilities(
                teacher_q,
                teacher_k,
                teacher_q_descriptor,
                teacher_k_descriptor,
                None,
                None,
                None,
                None,
                0,
                0,
                tl.cast(teacher_scale, tl.float32),
                teacher_logsumexp,
                teacher_row_maximum,
                total_units,
                q_unit,
                q_unit + q_last - q_first,
                k_unit,
                k_unit + key_last - k_first,
                support if JOINT else support + y,
                1,
                first_group + i_g,
                TEACHER_NUM_HEADS,
                TEACHER_NUM_KV_HEADS,
                TEACHER_HEADS,
                TEACHER_HEAD_DIM,
                TEACHER_CAUSAL,
                1,
                TEACHER_PRECISION,
                BLOCK_M,
                BLOCK_N,
                TEACHER_BLOCK_D,
            )[0]
        else:
            example_first = segment_field(segment_table, example * SEGMENTS, FIRST_UNIT, INDEX)
            map_row = (example * num_groups + first_group + i_g).to(INDEX) * max_units + q_unit - example_first
            p_t = maps + map_row * max_units + k_unit - example_first + o_i[:, None] * max_units + o_j[None, :]
            b_t = tl.load(p_t, mask=(o_i < q_last - q_first)[:, None] & m_j[None, :], other=0.0).to(tl.float32)
        terms, derivative = compared(chosen(student, y), b_t, METRIC)  # [BLOCK_M, BLOCK_N]
        stride = aligned_field(query_table, x, STRIDE, INDEX)
        origin = slab_row(query_table, x, slab_origin, ORIGIN, INDEX)
        origin += group_start(i_g, slab_elements, INDEX) + (q_first - range_row) * stride
        origin += aligned_field(key_table, key_segment + y, COLUMN, INDEX) + column_tile * BLOCK_N
        if difference is not None:
            p_d = difference + origin + o_i[:, None] * stride + o_j[None, :]
            # Whole tiles: past the range's last key there is room for them.
            tl.store(p_d, (derivative * FACTOR).to(difference.dtype.element_ty), mask=m_i[:, None])
        if partial_distances is not None:
            b_d = tl.sum(tl.where(m_j[None, :], terms, 0.0), 1)
            tl.store(partial_distances + (origin + o_i * stride) // BLOCK_N, b_d, mask=m_i)


@triton.jit(
    do_not_specialize=[
        "first_tile",
        "first_row",
        "last_row",
        "first_group",
        "slab_origin",
        "slab_elements",
        "total_units",
    ]
)
def row_distance_fwd_kernel(
    partial_distances,
    distances,
    segment_table,
    row_tiles,
    first_tile,
    first_row,
    last_row,
    first_group,
    slab_origin,
    slab_elements,
    total_units,
    SEGMENTS: tl.constexpr,
    SHARED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """distances (num_head_groups, total_units, segments): the column tiles' shares summed in their order."""
    i_t = first_tile + tl.program_id(0)
    i_y = tl.program_id(1)
    i_g = tl.program_id(2)
    query_segment = tl.load(row_tiles + i_t * 3).to(tl.int32)
    q_first = tl.load(row_tiles + i_t * 3 + 1).to(INDEX)
    q_last = tl.load(row_tiles + i_t * 3 + 2).to(INDEX)
    key_segment = query_segment // SEGMENTS * SEGMENTS + i_y
    o_i = tl.arange(0, BLOCK_M)
    row = q_first + o_i
    m_i = (row < q_last) & (row >= first_row) & (row < last_row)
    num_queries = segments_of(segment_table, query_segment, q_first, SEGMENTS, SHARED)
    query_table = part_table(segment_table, num_queries, SHARED)
    range_row = segment_field(query_table, query_segment, FIRST_TOKEN, INDEX)
    for x in range(num_queries):
        stride = aligned_field(query_table, query_segment + x, STRIDE, INDEX)
        origin = slab_row(query_table, query_segment + x, slab_origin, ORIGIN, INDEX)
        origin += group_start(i_g, slab_elements, INDEX) + (q_first - range_row) * stride
        b_d = tl.zeros([BLOCK_M], dtype=tl.float32)
        for part in range(1 + SHARED):
            key_table = part_table(segment_table, 1 + SHARED - part, SHARED)
            first, last = segment_tokens(key_table, key_segment, FIRST_TOKEN, INDEX)
            o_d = origin + aligned_field(key_table, key_segment, COLUMN, INDEX)
            p_d = partial_distances + (o_d + o_i * stride) // BLOCK_N
            for tile in range(tl.cdiv(last - first, BLOCK_N)):
                b_d += tl.load(p_d + tile, mask=m_i, other=0.0)
        unit = segment_field(query_table, query_segment + x, PART_UNIT, INDEX) + row - range_row
        p_o = distances + (tl.cast(first_group + i_g, INDEX) * total_units + unit) * SEGMENTS + i_y
        tl.store(p_o, tl.maximum(b_d, 0.0), mask=m_i)
