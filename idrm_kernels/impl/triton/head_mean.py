"""One side's map averaged over a group's heads, rows summed by unit: 1 product and 1 exp an element and head."""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import (
    FIRST_UNIT,
    LOG2_E,
    SEGMENT_FIELDS,
    aligned_field,
    group_start,
    load_rows,
    pair_of,
    product,
    scores,
    segment_tokens,
    slab_row,
)


@triton.jit
def mean_probabilities(
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
    total_tokens,
    q_first,
    q_last,
    k_first,
    k_last,
    support,
    group,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """P of a tile, mean over the HEADS heads of a group [BLOCK_M, BLOCK_N]; 0 beyond the rows and keys."""
    o_i = tl.arange(0, BLOCK_M)
    m_i = o_i < q_last - q_first
    o_support = (support * NUM_HEADS).to(q_first.dtype) * total_tokens + q_first + o_i
    b_p = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_h in range(group * HEADS, (group + 1) * HEADS):
        b_q = load_rows(q, q_descriptor, q_first, q_last, i_h, NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
        b_s = scores(
            b_q,
            k,
            k_descriptor,
            q_first,
            q_last,
            k_first,
            k_last,
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
        )
        o_l = o_support + tl.cast(i_h, q_first.dtype) * total_tokens
        if row_maximum is not None:
            b_s = (b_s - tl.load(row_maximum + o_l, mask=m_i, other=0.0)[:, None]) * LOG2_E
        b_l = tl.load(logsumexp + o_l, mask=m_i, other=float("inf"))
        b_p += tl.exp2(b_s - b_l[:, None])
    return tl.where(m_i[:, None], b_p * (1.0 / HEADS), 0.0)


@triton.jit(
    do_not_specialize=[
        "max_delta",
        "num_slots",
        "total_tokens",
        "num_examples",
        "first_pair",
        "first_slot",
        "last_slot",
        "first_group",
        "staged_origin",
        "staged_elements",
    ]
)
def head_mean_fwd_kernel(
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
    total_tokens,
    staged,
    segment_table,
    example_table,
    num_examples,
    runs,
    units,
    slots,
    first_pair,
    first_slot,
    last_slot,
    first_group,
    staged_origin,
    staged_elements,
    SEGMENTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ORIGINS: tl.constexpr,
    RUNS: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """staged (groups, slots, columns), a slot's row the sum over its tokens; a program has one run and column tile."""
    example, run, key_segment, column_tile = pair_of(
        segment_table,
        example_table,
        num_examples,
        first_pair + tl.program_id(0),
        SEGMENTS,
        PAIRS,
        RUNS,
        TOKENS,
        BLOCK_N,
        BLOCK_EXAMPLES,
    )
    i_g = tl.program_id(1)
    query_segment = tl.load(runs + run * 4).to(tl.int32)
    q_first = tl.load(runs + run * 4 + 1).to(INDEX)
    q_last = tl.load(runs + run * 4 + 2).to(INDEX)
    slot = tl.load(runs + run * 4 + 3)
    segment_first, segment_last = segment_tokens(segment_table, key_segment, TOKENS, INDEX)
    k_first = segment_first + column_tile * BLOCK_N
    support = key_segment - example * SEGMENTS
    if JOINT:
        support = support * 0
    b_p = mean_probabilities(
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
        tl.cast(scale, tl.float32),
        logsumexp,
        row_maximum,
        total_tokens,
        q_first,
        q_last,
        k_first,
        segment_last,
        support,
        first_group + i_g,
        NUM_HEADS,
        NUM_KV_HEADS,
        HEADS,
        HEAD_DIM,
        CAUSAL,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    o_r = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    num_rows = (q_last - q_first).to(tl.int32)
    if MERGED:
        unit = tl.load(units + q_first + o_r, mask=o_r < num_rows, other=-1)
        first_unit = tl.load(units + q_first)
        num_rows = (tl.load(units + q_last - 1) - first_unit).to(tl.int32) + 1
        member = (o_r[:, None] == (unit - first_unit)[None, :]).to(tl.float32).to(tl.bfloat16)  # [slots, tokens]
        # Three bfloat16 parts hold all of a float32, and a product with zeros and ones is exact.
        high = b_p.to(tl.bfloat16)
        rest = b_p - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        b_p = product(member, low, None, "ieee")
        b_p = product(member, middle, b_p, "ieee")
        b_p = product(member, high, b_p, "ieee")
    # A run's rows count from its slot; those of other slabs are theirs to write.
    row_slot = slot + o_r
    m_r = (o_r < num_rows) & (row_slot >= first_slot) & (row_slot < last_slot)
    width = aligned_field(segment_table, query_segment, WIDTHS, INDEX)
    segment_slot = tl.load(slots + tl.load(segment_table + query_segment * SEGMENT_FIELDS + FIRST_UNIT))
    origin = slab_row(segment_table, query_segment, staged_origin, ORIGINS, INDEX)
    origin += group_start(i_g, staged_elements, INDEX) + (slot - segment_slot).to(INDEX) * width
    origin += aligned_field(segment_table, key_segment, COLUMNS, INDEX) + column_tile * BLOCK_N
    p_s = staged + origin + o_r[:, None] * width + o_j[None, :]
    tl.store(p_s, b_p, mask=m_r[:, None] & (o_j < segment_last - k_first)[None, :])
