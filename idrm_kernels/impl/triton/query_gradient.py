"""dq, and the delta of every softmax, in one pass over the keys: 3 products and 1 exp an element.

With w = P (dP - mu) rounded as the matrix product reads it, dq = scale * sum_j w_j (k_j - mean_k): two sums, A of w k
and B of the rounded P k, and dq = scale * (A - B sum(w) / sum(P)). Every rounding error meets k_j - mean_k, as it would
in P (dP - delta), so that nothing cancels on attention sinks. Any mu is right; that of the first tile, its part of
delta, keeps w small where sinks lie first, and makes it 0 where dP is constant: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import (
    COLUMN,
    FIRST_TOKEN,
    LOG2_E,
    ORIGIN,
    PART_UNIT,
    PREFIX,
    STRIDE,
    aligned_field,
    chosen,
    group_start,
    load_rows,
    part_table,
    power_of_two,
    product,
    rounded,
    segment_field,
    segment_tokens,
    segments_of,
    shared_denominators,
    slab_row,
)


@triton.jit
def row_coefficients(coefficients, o_i, m_i, i_g, i_y, total_tokens, SEGMENTS: tl.constexpr, FACTOR: tl.constexpr):
    """d loss / d P over the slab's entries for some tokens' rows."""
    return tl.load(coefficients + (i_g * total_tokens + o_i) * SEGMENTS + i_y, mask=m_i, other=0.0) * FACTOR


@triton.jit
def without_mean(b_a, b_b, b_delta, b_w, b_p, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A - B sum(w) / sum(P) [BLOCK_M, BLOCK_D]."""
    if dtype == tl.float32 and PRECISION == "ieee":
        ratio = b_delta
    else:
        ratio = tl.where(b_p > 0, b_w / tl.where(b_p > 0, b_p, 1.0), 0.0)
    return b_a - ratio[:, None] * b_b


@triton.jit(
    do_not_specialize=[
        "total_tokens",
        "first_tile",
        "first_row",
        "last_row",
        "first_group",
        "num_heads_of_slab",
        "slab_origin",
        "slab_elements",
    ]
)
def query_gradient_bwd_kernel(
    q,
    k,
    q_descriptor,
    k_descriptor,
    scale,
    softmax_scale,
    logsumexp,
    row_maximum,
    total_tokens,
    difference,
    coefficients,
    units,
    dq,
    delta,
    segment_table,
    row_tiles,
    first_tile,
    first_row,
    last_row,
    first_group,
    num_heads_of_slab,
    slab_origin,
    slab_elements,
    SEGMENTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    JOINT: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq (total_tokens, num_heads, head_dim); delta (supports, num_heads, total_tokens); one row tile and head each.

    A and B are b_a and b_b, the sums of w and of the rounded P b_w and b_p.
    coefficients (num_head_groups, total_tokens, segments); units, which say where a token's row of difference begins,
    are None where a unit is a token. The rows of a SHARED prefix have been summed over the segments.
    SCALED rows are multiplied by a power of two while in half precision: float16 would underflow.
    """
    i_t = first_tile + tl.program_id(0) // num_heads_of_slab
    i_h = first_group * HEADS + tl.program_id(0) % num_heads_of_slab
    i_k = i_h // (NUM_HEADS // NUM_KV_HEADS)
    i_g = i_h // HEADS
    query_segment = tl.load(row_tiles + i_t * 3).to(tl.int32)
    q_first = tl.load(row_tiles + i_t * 3 + 1).to(INDEX)
    q_last = tl.load(row_tiles + i_t * 3 + 2).to(INDEX)
    example_segment = query_segment // SEGMENTS * SEGMENTS
    scale = tl.cast(scale, tl.float32)
    o_i = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    row = q_first + o_i
    m_i = (row < q_last) & (row >= first_row) & (row < last_row)
    num_queries = segments_of(segment_table, query_segment, q_first, SEGMENTS, SHARED)
    query_table = part_table(segment_table, num_queries, SHARED)
    if units is None:
        range_row = row - segment_field(query_table, query_segment, FIRST_TOKEN, INDEX)
    else:
        unit = tl.load(units + row, mask=m_i, other=0).to(INDEX)
        range_row = unit - segment_field(query_table, query_segment, PART_UNIT, INDEX)
    o_row = range_row * aligned_field(query_table, query_segment, STRIDE, INDEX)
    o_row += slab_row(query_table, query_segment, slab_origin, ORIGIN, INDEX)
    o_row += group_start(i_g - first_group, slab_elements, INDEX)
    b_q = load_rows(q, q_descriptor, q_first, q_last, i_h, NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
    row_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if SCALED > 0:
        b_largest = tl.zeros([BLOCK_M], dtype=tl.float32)
        for y in range(SEGMENTS):
            b_c = row_coefficients(coefficients, row, m_i, tl.cast(i_g, INDEX), y, total_tokens, SEGMENTS, FACTOR)
            b_largest = tl.maximum(b_largest, tl.abs(b_c))
        row_scale = power_of_two(b_largest)
    o_head = tl.cast(i_h, INDEX) * total_tokens + row
    b_a = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_b = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_mu = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_w = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_p = tl.zeros([BLOCK_M], dtype=tl.float32)
    begun = 0
    if SHARED:
        # A prefix key's P in the softmax of y is the quotient of y times p, that of the smallest denominator, so that
        # B and the sum of p are taken once; w is summed over the segments before it meets the key.
        SUPPORTS: tl.constexpr = 1 if JOINT else SEGMENTS
        stride = NUM_HEADS * tl.cast(total_tokens, INDEX)
        b_l, b_m, quotients = shared_denominators(logsumexp, row_maximum, o_head, stride, SUPPORTS, m_i, SUPPORTS)
        weights = ()
        deltas = ()
        mus = ()
        for y in tl.static_range(SEGMENTS):
            b_c = row_coefficients(coefficients, row, m_i, tl.cast(i_g, INDEX), y, total_tokens, SEGMENTS, FACTOR)
            weights += (b_c / row_scale * (1.0 if JOINT else quotients[y]),)
        for _ in tl.static_range(SUPPORTS):
            deltas += (tl.zeros([BLOCK_M], dtype=tl.float32),)
            mus += (tl.zeros([BLOCK_M], dtype=tl.float32),)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        first, last = segment_tokens(segment_table + PREFIX, example_segment, FIRST_TOKEN, INDEX)
        for tile in range(tl.cdiv(last - first, BLOCK_N).to(tl.int32)):
            k_first = first + tile * BLOCK_N
            b_k = load_rows(k, k_descriptor, k_first, last, i_k, NUM_KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_D)
            b_s = product(b_q, tl.trans(b_k), None, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
            if row_maximum is not None:
                b_s = (b_s - b_m[:, None]) * LOG2_E
            m_j = (o_j < last - k_first)[None, :]
            probabilities = tl.where(m_j, tl.exp2(b_s - b_l[:, None]), 0.0)
            b_e = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            own_deltas = ()
            for y in tl.static_range(SEGMENTS):
                column = aligned_field(segment_table + PREFIX, example_segment + y, COLUMN, INDEX) + tile * BLOCK_N
                p_d = difference + (o_row + column)[:, None] + o_j[None, :]
                b_d = tl.load(p_d, mask=m_i[:, None], other=0.0).to(tl.float32)
                own = tl.where(m_j, b_d, 0.0) * weights[y][:, None]
                if not JOINT:
                    own_deltas += (tl.sum(probabilities * own, 1),)
                b_e += own
            if JOINT:
                own_deltas = (tl.sum(probabilities * b_e, 1),)
            sums = ()
            first_deltas = ()
            b_shift = tl.zeros([BLOCK_M], dtype=tl.float32)
            for n in tl.static_range(SUPPORTS):
                sums += (deltas[n] + own_deltas[n],)
                first_deltas += (tl.where(tile == 0, own_deltas[n], mus[n]),)
                b_shift += first_deltas[n] * (SEGMENTS if JOINT else quotients[n])
            deltas = sums
            mus = first_deltas
            weighted = probabilities * b_e
            if b_k.dtype != tl.float32 or PRECISION != "ieee":
                weighted -= probabilities * b_shift[:, None]
            operand, value = rounded(weighted, b_k.dtype, PRECISION)
            b_a = product(operand, b_k, b_a, PRECISION)
            operand_p, value_p = rounded(probabilities, b_k.dtype, PRECISION)
            b_b = product(operand_p, b_k, b_b, PRECISION)
            b_sum += tl.sum(probabilities, 1)
            b_w += tl.sum(value, 1)
            b_p += tl.sum(value_p, 1)
        begun = 1
        if JOINT:
            b_delta = deltas[0]
            b_mu = mus[0]
            b_b *= SEGMENTS
            b_p *= SEGMENTS
        else:
            # What w's rounding adds to its sum is spread over the softmaxes as P is.
            b_excess = b_w
            b_quotients = tl.zeros([BLOCK_M], dtype=tl.float32)
            for y in tl.static_range(SEGMENTS):
                b_excess -= deltas[y] - mus[y] * quotients[y] * b_sum
                b_quotients += quotients[y]
            b_excess /= tl.where(m_i, b_quotients, 1.0)
            b_prefix_b = b_b
            b_prefix_p = b_p
    for y in range(SEGMENTS):
        first, last = segment_tokens(segment_table, example_segment + y, FIRST_TOKEN, INDEX)
        p_d = difference + (o_row + aligned_field(segment_table, example_segment + y, COLUMN, INDEX))[:, None]
        p_d += o_j[None, :]
        if CAUSAL:
            last = tl.minimum(last, q_last)
        o_support = o_head if JOINT else o_head + (y * NUM_HEADS) * tl.cast(total_tokens, INDEX)
        b_l = tl.load(logsumexp + o_support, mask=m_i, other=float("inf"))
        b_m = b_l
        if row_maximum is not None:
            b_m = tl.load(row_maximum + o_support, mask=m_i, other=0.0)
        b_c = row_coefficients(coefficients, row, m_i, tl.cast(i_g, INDEX), y, total_tokens, SEGMENTS, FACTOR)
        b_c /= row_scale
        if SHARED and not JOINT:
            b_quotient = chosen(quotients, y)
            b_delta = chosen(deltas, y)
            b_mu = chosen(mus, y)
            b_b = b_prefix_b * b_quotient[:, None]
            b_p = b_prefix_p * b_quotient
            b_w = b_delta + (b_excess - b_mu * b_sum) * b_quotient
        for tile in range(tl.cdiv(last - first, BLOCK_N).to(tl.int32)):
            k_first = first + tile * BLOCK_N
            b_k = load_rows(k, k_descriptor, k_first, last, i_k, NUM_KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_D)
            b_s = product(b_q, tl.trans(b_k), None, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
            if row_maximum is not None:
                b_s = (b_s - b_m[:, None]) * LOG2_E
            m_j = (o_j < last - k_first)[None, :]
            if CAUSAL:
                m_j &= (k_first + o_j)[None, :] <= row[:, None]
            probabilities = tl.where(m_j, tl.exp2(b_s - b_l[:, None]), 0.0)
            # Past the last key there is room for the whole tile, and anything in it.
            b_d = tl.load(p_d + tile * BLOCK_N, mask=m_i[:, None], other=0.0).to(tl.float32)
            weighted = probabilities * (tl.where(m_j, b_d, 0.0) * b_c[:, None])
            own_delta = tl.sum(weighted, 1)
            b_delta += own_delta
            if b_k.dtype != tl.float32 or PRECISION != "ieee":
                b_mu = tl.where(begun + tile == 0, own_delta, b_mu)
                weighted -= probabilities * b_mu[:, None]
            operand, value = rounded(weighted, b_k.dtype, PRECISION)
            b_a = product(operand, b_k, b_a, PRECISION)
            operand_p, value_p = rounded(probabilities, b_k.dtype, PRECISION)
            b_b = product(operand_p, b_k, b_b, PRECISION)
            if b_k.dtype != tl.float32 or PRECISION != "ieee":
                b_w += tl.sum(value, 1)
                b_p += tl.sum(value_p, 1)
        if JOINT:
            begun += (last > first).to(tl.int32)
        else:
            b_a = without_mean(b_a, b_b, b_delta, b_w, b_p, b_q.dtype, PRECISION)
            tl.store(delta + o_support, b_delta * row_scale, mask=m_i)
            b_b = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            b_delta = tl.zeros([BLOCK_M], dtype=tl.float32)
            b_w = tl.zeros([BLOCK_M], dtype=tl.float32)
            b_p = tl.zeros([BLOCK_M], dtype=tl.float32)
    if JOINT:
        b_a = without_mean(b_a, b_b, b_delta, b_w, b_p, b_q.dtype, PRECISION)
        tl.store(delta + o_head, b_delta * row_scale, mask=m_i)
    b_a *= (tl.cast(softmax_scale, tl.float32) * row_scale)[:, None]
    p_q = dq + (q_first * NUM_HEADS + i_h) * HEAD_DIM + o_i[:, None] * (NUM_HEADS * HEAD_DIM) + o_d[None, :]
    tl.store(p_q, b_a.to(dq.dtype.element_ty), mask=m_i[:, None] & (o_d < HEAD_DIM)[None, :])
