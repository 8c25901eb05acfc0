"""The logarithm of every softmax's denominator, online over the keys: 1 product and 1 exp an element."""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import LOG2_E, load_rows, range_of, scores, segment_tokens


@triton.jit
def store_statistics(b_max, b_sum, logsumexp, row_maximum, o_l, m_i):
    """A tile's rows of one support."""
    if row_maximum is None:
        tl.store(logsumexp + o_l, b_max + tl.log2(b_sum), mask=m_i)
    else:
        tl.store(row_maximum + o_l, b_max, mask=m_i)
        tl.store(logsumexp + o_l, tl.log2(b_sum), mask=m_i)


@triton.jit(
    do_not_specialize=[
        "max_delta",
        "num_slots",
        "first_tile",
        "total_tokens",
    ]
)
def logsumexp_fwd_kernel(
    q,
    k,
    q_descriptor,
    k_descriptor,
    positions,
    slot_of_delta,
    c2p,
    p2c,
    max_delta,
    num_slots,
    scale,
    logsumexp,
    row_maximum,
    segment_table,
    row_tiles,
    first_tile,
    total_tokens,
    SEGMENTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    JOINT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """logsumexp (supports, num_heads, total_tokens) in base 2; a program has one row tile and head.

    With row_maximum, of the same shape, that has the maximum, in base e, and logsumexp the rest: their sum would lose
    as many bits as large scores have before the point, which float32 in full precision would show. Where a prefix is
    SHARED, every segment's sum goes on from the prefix's.
    """
    i_t = first_tile + tl.program_id(0) // NUM_HEADS
    i_h = tl.program_id(0) % NUM_HEADS
    segment = tl.load(row_tiles + i_t * 3).to(tl.int32)
    q_first = tl.load(row_tiles + i_t * 3 + 1).to(INDEX)
    q_last = tl.load(row_tiles + i_t * 3 + 2).to(INDEX)
    scale = tl.cast(scale, tl.float32)
    o_i = tl.arange(0, BLOCK_M)
    m_i = o_i < q_last - q_first
    b_q = load_rows(q, q_descriptor, q_first, q_last, i_h, NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    o_l = tl.cast(i_h, INDEX) * total_tokens + q_first + o_i
    b_first_max = b_max
    b_first_sum = b_sum
    for r in range(SEGMENTS + SHARED):
        key_segment, table = range_of(segment_table, segment // SEGMENTS * SEGMENTS, r, SEGMENTS, SHARED)
        first, last = segment_tokens(table, key_segment, TOKENS, INDEX)
        if CAUSAL:
            last = tl.minimum(last, q_last)
        for j in range(first, last, BLOCK_N):
            b_s = scores(
                b_q,
                k,
                k_descriptor,
                q_first,
                q_last,
                j,
                last,
                i_h,
                scale,
                positions,
                slot_of_delta,
                c2p,
                p2c,
                max_delta,
                num_slots,
                NUM_HEADS,
                NUM_KV_HEADS,
                HEAD_DIM,
                CAUSAL,
                row_maximum is not None,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )  # [BLOCK_M, BLOCK_N]
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            if row_maximum is None:
                b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
            else:
                rest = tl.sum(tl.exp2((b_s - b_new[:, None]) * LOG2_E), 1)
                b_sum = b_sum * tl.exp2((b_max - b_new) * LOG2_E) + rest
            b_max = b_new
        if SHARED:
            if JOINT:
                b_sum *= tl.where(r == 0, SEGMENTS, 1)
            else:
                b_first_max = tl.where(r == 0, b_max, b_first_max)
                b_first_sum = tl.where(r == 0, b_sum, b_first_sum)
        if not JOINT:
            if SHARED:
                o_s = o_l + (r - 1) * (NUM_HEADS * tl.cast(total_tokens, INDEX))
                store_statistics(b_max, b_sum, logsumexp, row_maximum, o_s, m_i & (r > 0))
            else:
                store_statistics(b_max, b_sum, logsumexp, row_maximum, o_l, m_i)
                o_l += NUM_HEADS * tl.cast(total_tokens, INDEX)
            b_max = b_first_max
            b_sum = b_first_sum
    if JOINT:
        store_statistics(b_max, b_sum, logsumexp, row_maximum, o_l, m_i)
