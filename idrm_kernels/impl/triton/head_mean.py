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
    segments_of,
    shared_denominators,
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
    num_supports,
    group,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    SUPPORTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """P of a tile, mean over the HEADS heads of a group [BLOCK_M, BLOCK_N]; 0 beyond the rows and keys.

    A tuple of SUPPORTS such tiles, one for each of the num_supports softmaxes from ``support`` on that the keys lie in.
    """
    o_i = tl.arange(0, BLOCK_M)
    m_i = o_i < q_last - q_first
    o_support = (support * NUM_HEADS).to(q_first.dtype) * total_tokens + q_first + o_i
    b_p = ()
    for _ in tl.static_range(SUPPORTS):
        b_p += (tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32),)
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
        if SUPPORTS == 1:
            b_l = tl.load(logsumexp + o_l, mask=m_i, other=float("inf"))
            b_m = b_l
            if row_maximum is not None:
                b_m = tl.load(row_maximum + o_l, mask=m_i, other=0.0)
            quotients = (None,)
        else:
            stride = NUM_HEADS * tl.cast(total_tokens, q_first.dtype)
            b_l, b_m, quotients = shared_denominators(logsumexp, row_maximum, o_l, stride, num_supports, m_i, SUPPORTS)
        if row_maximum is not None:
            b_s = (b_s - b_m[:, None]) * LOG2_E
        b_e = tl.exp2(b_s - b_l[:, None])
        sums = ()
        for n in tl.static_range(SUPPORTS):
            sums += (b_p[n] + (b_e if SUPPORTS == 1 else b_e * quotients[n][:, None]),)
        b_p = sums
    means = ()
    for n in tl.static_range(SUPPORTS):
        means += (tl.where(m_i[:, None], b_p[n] * (1.0 / HEADS), 0.0),)
    return means


@triton.jit
def summed_rows(member, b_p):
    """The product with a matrix of zeros and ones, exact: three bfloat16 parts hold all of a float32."""
    high = b_p.to(tl.bfloat16)
    rest = b_p - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    b_u = product(member, low, None, "ieee")
    b_u = product(member, middle, b_u, "ieee")
    return product(member, high, b_u, "ieee")


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
    SHARED: tl.constexpr,
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
    """staged (groups, slots, columns), a slot's row the sum over its tokens; a program has one run and column tile.

    A prefix that segments share has the columns of every segment, and its rows once.
    """
    example, run, key_segment, key_table, column_tile = pair_of(
        segment_table,
        example_table,
        num_examples,
        first_pair + tl.program_id(0),
        SEGMENTS,
        PAIRS,
        RUNS,
        TOKENS,
        SHARED,
        BLOCK_N,
        BLOCK_EXAMPLES,
    )
    i_g = tl.program_id(1)
    query_segment = tl.load(runs + run * 4).to(tl.int32)
    q_first = tl.load(runs + run * 4 + 1).to(INDEX)
    q_last = tl.load(runs + run * 4 + 2).to(INDEX)
    slot = tl.load(runs + run * 4 + 3)
    range_first, range_last = segment_tokens(key_table, key_segment, TOKENS, INDEX)
    k_first = range_first + column_tile * BLOCK_N
    support = key_segment - example * SEGMENTS
    if JOINT:
        support = support * 0
    NUM_KEYS: tl.constexpr = SEGMENTS if SHARED else 1
    SUPPORTS: tl.constexpr = 1 if JOINT else NUM_KEYS
    num_keys = segments_of(segment_table, key_segment, k_first, SEGMENTS, SHARED)
    maps = mean_probabilities(
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
        range_last,
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
    o_r = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    num_rows = (q_last - q_first).to(tl.int32)
    if MERGED:
        unit = tl.load(units + q_first + o_r, mask=o_r < num_rows, other=-1)
        first_unit = tl.load(units + q_first)
        num_rows = (tl.load(units + q_last - 1) - first_unit).to(tl.int32) + 1
        member = (o_r[:, None] == (unit - first_unit)[None, :]).to(tl.float32).to(tl.bfloat16)  # [slots, tokens]
        sums = ()
        for n in tl.static_range(SUPPORTS):
            sums += (summed_rows(member, maps[n]),)
        maps = sums
    # A run's rows count from its slot; those of other slabs are theirs to write.
    row_slot = slot + o_r
    m_r = (o_r < num_rows) & (row_slot >= first_slot) & (row_slot < last_slot)
    width = aligned_field(segment_table, query_segment, WIDTHS, INDEX)
    segment_slot = tl.load(slots + tl.load(segment_table + query_segment * SEGMENT_FIELDS + FIRST_UNIT))
    origin = slab_row(segment_table, query_segment, staged_origin, ORIGINS, INDEX)
    origin += group_start(i_g, staged_elements, INDEX) + (slot - segment_slot).to(INDEX) * width
    origin += column_tile * BLOCK_N
    for n in tl.static_range(NUM_KEYS):
        column = aligned_field(key_table, key_segment + tl.minimum(n, num_keys - 1), COLUMNS, INDEX)
        p_s = staged + origin + column + o_r[:, None] * width + o_j[None, :]
        m_n = m_r[:, None] & (o_j < range_last - k_first)[None, :] & (n < num_keys)
        tl.store(p_s, maps[n if SUPPORTS > 1 else 0], mask=m_n)
