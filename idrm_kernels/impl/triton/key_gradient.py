"""dk over the rows of a slab and the query heads that share a key head: 2 products and 1 exp an element and head."""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import (
    COLUMN,
    FIRST_TOKEN,
    LOG2_E,
    ORIGIN,
    PART_UNIT,
    STRIDE,
    aligned_field,
    group_start,
    load_rows,
    part_table,
    power_of_two,
    product,
    range_of,
    rounded,
    segment_field,
    segment_tokens,
    segments_of,
    shared_denominators,
    slab_row,
)
from idrm_kernels.impl.triton.query_gradient import row_coefficients


@triton.jit(
    do_not_specialize=[
        "total_tokens",
        "partial_first",
        "first_tile",
        "first_row",
        "last_row",
        "first_group",
        "last_group",
        "slab_origin",
        "slab_elements",
    ]
)
def key_gradient_bwd_kernel(
    q,
    k,
    q_descriptor,
    k_descriptor,
    scale,
    softmax_scale,
    logsumexp,
    row_maximum,
    delta,
    total_tokens,
    difference,
    coefficients,
    units,
    dk,
    partial_dk,
    partial_first,
    segment_table,
    key_tiles,
    first_tile,
    first_row,
    last_row,
    first_group,
    last_group,
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
    BEGINS: tl.constexpr,
    ENDS: tl.constexpr,
    SCALED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk (total_tokens, num_kv_heads, head_dim); a program has one key tile and key head.

    The rows come in the order group, range, tile, head. Where an example has several slabs, a slab goes on from
    partial_dk, the sums of its tokens from partial_first on, where the last one left them: no bit depends on the slabs.
    b_dk is held in units of unit_scale, a power of two that keeps float16 operands from underflowing.
    """
    HEADS_OF_KEY: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    i_t = first_tile + tl.program_id(0) // NUM_KV_HEADS
    i_k = tl.program_id(0) % NUM_KV_HEADS
    key_segment = tl.load(key_tiles + i_t * 3).to(tl.int32)
    k_first = tl.load(key_tiles + i_t * 3 + 1).to(INDEX)
    k_last = tl.load(key_tiles + i_t * 3 + 2).to(INDEX)
    example_segment = key_segment // SEGMENTS * SEGMENTS
    i_y = key_segment - example_segment
    num_keys = segments_of(segment_table, key_segment, k_first, SEGMENTS, SHARED)
    key_table = part_table(segment_table, num_keys, SHARED)
    NUM_KEYS: tl.constexpr = SEGMENTS if SHARED else 1
    columns = ()
    for n in tl.static_range(NUM_KEYS):
        # The last of them stands for segments that the keys do not lie in.
        column = aligned_field(key_table, key_segment + (tl.minimum(n, num_keys - 1) if SHARED else 0), COLUMN, INDEX)
        range_first = segment_field(key_table, key_segment, FIRST_TOKEN, INDEX)
        columns += (column + tl.multiple_of(k_first - range_first, BLOCK_N),)
    scale = tl.cast(scale, tl.float32)
    o_i = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    b_k = load_rows(k, k_descriptor, k_first, k_last, i_k, NUM_KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_D)
    m_k = (o_j < k_last - k_first)[:, None] & (o_d < HEAD_DIM)[None, :]
    o_k = i_k * HEAD_DIM + o_j[:, None] * (NUM_KV_HEADS * HEAD_DIM) + o_d[None, :]
    if BEGINS:
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    else:
        p_p = partial_dk + (k_first - partial_first) * (NUM_KV_HEADS * HEAD_DIM)
        b_dk = tl.load(p_p + o_k, mask=m_k, other=0.0)
    unit_scale = tl.full([], 1.0, tl.float32)
    first_own = tl.maximum(first_group, i_k * HEADS_OF_KEY // HEADS)
    last_own = tl.minimum(last_group, tl.cdiv((i_k + 1) * HEADS_OF_KEY, HEADS))
    for i_g in range(first_own, last_own):
        first_head = tl.maximum(i_k * HEADS_OF_KEY, i_g * HEADS)
        num_heads = tl.minimum((i_k + 1) * HEADS_OF_KEY, (i_g + 1) * HEADS) - first_head
        group_origin = group_start(i_g - first_group, slab_elements, INDEX)
        for r in range(SEGMENTS + SHARED):
            query_segment, query_table = range_of(segment_table, example_segment, r, SEGMENTS, SHARED)
            first, last = segment_tokens(query_table, query_segment, FIRST_TOKEN, INDEX)
            if units is None:
                range_first = first
            else:
                range_first = segment_field(query_table, query_segment, PART_UNIT, INDEX)
            stride = aligned_field(query_table, query_segment, STRIDE, INDEX)
            row_origin = slab_row(query_table, query_segment, slab_origin, ORIGIN, INDEX) + group_origin
            if CAUSAL:
                begin = first + (k_first - first) // BLOCK_M * BLOCK_M
            else:
                begin = first
            begin = tl.maximum(begin, first_row)
            last = tl.minimum(last, last_row)
            num_tiles = tl.maximum(tl.cdiv(last - begin, BLOCK_M), 0).to(tl.int32)
            for step in range(num_tiles * num_heads):
                q_first = begin + (step // num_heads) * BLOCK_M
                i_h = first_head + step % num_heads
                row = q_first + o_i
                m_i = row < last
                b_q = load_rows(q, q_descriptor, q_first, last, i_h, NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
                if row_maximum is None:
                    b_s = product(b_k, tl.trans(b_q), None, PRECISION) * scale  # [BLOCK_N, BLOCK_M]
                else:
                    # As the other kernels have it, to the bit: delta cancels only against its own probabilities.
                    b_s = tl.trans(product(b_q, tl.trans(b_k), None, PRECISION)) * scale
                o_l = tl.cast(i_h, INDEX) * total_tokens + row
                if not JOINT:
                    o_l += tl.cast(i_y * NUM_HEADS, INDEX) * total_tokens
                if SHARED and not JOINT:
                    support_stride = NUM_HEADS * tl.cast(total_tokens, INDEX)
                    b_l, b_m, quotients = shared_denominators(
                        logsumexp, row_maximum, o_l, support_stride, num_keys, m_i, NUM_KEYS
                    )
                else:
                    b_l = tl.load(logsumexp + o_l, mask=m_i, other=float("inf"))
                    b_m = b_l
                    if row_maximum is not None:
                        b_m = tl.load(row_maximum + o_l, mask=m_i, other=0.0)
                if row_maximum is not None:
                    b_s = (b_s - b_m[None, :]) * LOG2_E
                b_delta = tl.load(delta + o_l, mask=m_i, other=0.0)
                b_c = row_coefficients(coefficients, row, m_i, tl.cast(i_g, INDEX), i_y, total_tokens, SEGMENTS, FACTOR)
                weights = (b_c,)
                if SHARED:
                    # Of all segments that the keys lie in: their coefficients and the sum of their deltas.
                    if JOINT:
                        b_delta *= num_keys
                    else:
                        weights = (b_c * quotients[0],)
                        b_delta *= quotients[0]
                    for n in tl.static_range(1, NUM_KEYS):
                        m_n = m_i & (n < num_keys)
                        b_c = row_coefficients(
                            coefficients, row, m_n, tl.cast(i_g, INDEX), i_y + n, total_tokens, SEGMENTS, FACTOR
                        )
                        if JOINT:
                            weights += (b_c,)
                        else:
                            weights += (b_c * quotients[n],)
                            b_delta += tl.load(delta + o_l + n * support_stride, mask=m_n, other=0.0) * quotients[n]
                if SCALED > 0:
                    # Under "joint" a row reaches keys of segments whose own coefficient is 0, through delta.
                    largest = tl.max(tl.abs(b_delta)) * SCALED
                    for n in tl.static_range(NUM_KEYS):
                        largest = tl.maximum(tl.max(tl.abs(weights[n])), largest)
                    own = tl.where(largest > 0, power_of_two(largest), unit_scale)
                    b_dk *= unit_scale / own
                    unit_scale = own
                    scaled = ()
                    for n in tl.static_range(NUM_KEYS):
                        scaled += (weights[n] / own,)
                    weights = scaled
                    b_delta /= own
                if units is None:
                    unit = row
                else:
                    unit = tl.load(units + row, mask=m_i, other=0).to(INDEX)
                # Past the range's last key there is room for whole tiles; what it holds meets keys that do not exist.
                o_r = row_origin + (unit - range_first) * stride
                p_d = difference + (o_r + columns[0])[:, None] + o_j[None, :]
                b_e = tl.trans(tl.load(p_d, mask=m_i[:, None], other=0.0)).to(tl.float32) * weights[0][None, :]
                for n in tl.static_range(1, NUM_KEYS):
                    p_d = difference + (o_r + columns[n])[:, None] + o_j[None, :]
                    b_d = tl.load(p_d, mask=m_i[:, None] & (n < num_keys), other=0.0)
                    b_e += tl.trans(b_d).to(tl.float32) * weights[n][None, :]
                probabilities = tl.exp2(b_s - b_l[None, :])
                if CAUSAL:
                    probabilities = tl.where((k_first + o_j)[:, None] <= row[None, :], probabilities, 0.0)
                b_ds = probabilities * (b_e - b_delta[None, :])
                operand, _ = rounded(b_ds, b_q.dtype, PRECISION)
                b_dk = product(operand, b_q, b_dk, PRECISION)
    b_dk *= unit_scale
    if ENDS:
        p_k = dk + k_first * (NUM_KV_HEADS * HEAD_DIM)
        tl.store(p_k + o_k, (b_dk * tl.cast(softmax_scale, tl.float32)).to(dk.dtype.element_ty), mask=m_k)
    else:
        p_p = partial_dk + (k_first - partial_first) * (NUM_KV_HEADS * HEAD_DIM)
        tl.store(p_p + o_k, b_dk, mask=m_k)
