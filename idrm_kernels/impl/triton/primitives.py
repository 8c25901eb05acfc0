"""What the kernels share: reading the plan, loading tiles of q and k, scores, probabilities and roundings."""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels import tiles

FIRST_TOKEN = tl.constexpr(int(tiles.SegmentField.FIRST_TOKEN))
TEACHER_FIRST_TOKEN = tl.constexpr(int(tiles.SegmentField.TEACHER_FIRST_TOKEN))
FIRST_UNIT = tl.constexpr(int(tiles.SegmentField.FIRST_UNIT))
PART_UNIT = tl.constexpr(int(tiles.SegmentField.PART_UNIT))
COLUMN = tl.constexpr(int(tiles.SegmentField.COLUMN))
TEACHER_COLUMN = tl.constexpr(int(tiles.SegmentField.TEACHER_COLUMN))
WIDTH = tl.constexpr(int(tiles.SegmentField.WIDTH))
TEACHER_WIDTH = tl.constexpr(int(tiles.SegmentField.TEACHER_WIDTH))
ORIGIN = tl.constexpr(int(tiles.SegmentField.ORIGIN))
STRIDE = tl.constexpr(int(tiles.SegmentField.STRIDE))
PREFIX = tl.constexpr(int(tiles.PREFIX))
SLOT_ORIGIN = tl.constexpr(int(tiles.SegmentField.SLOT_ORIGIN))
TEACHER_SLOT_ORIGIN = tl.constexpr(int(tiles.SegmentField.TEACHER_SLOT_ORIGIN))
SEGMENT_FIELDS = tl.constexpr(len(tiles.SegmentField))
EXAMPLE_FIELDS = tl.constexpr(len(tiles.ExampleField))

RUN_TOKENS = tl.constexpr(tiles.RUN_TOKENS)

LOG2_E = tl.constexpr(1.4426950408889634)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b added to a float32 accumulator, or from 0 where that is None; PRECISION is of float32 operands."""
    if INTERPRETED:
        # Triton's interpreter takes bfloat16 operands for integers, and a BLAS of its machine may round the same scores
        # in two ways, by how their tiles lie in memory. A recomputed score that differs makes errors that are not ours.
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        return exact if accumulator is None else accumulator + exact
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def segment_field(segment_table, segment, FIELD: tl.constexpr, INDEX: tl.constexpr):
    """One count of a segment as an offset of type INDEX."""
    return tl.load(segment_table + segment * SEGMENT_FIELDS + FIELD).to(INDEX)


@triton.jit
def aligned_field(segment_table, segment, FIELD: tl.constexpr, INDEX: tl.constexpr):
    """A width or a column of a segment: multiples of the column alignment, which lets whole vectors be loaded."""
    # Not of segment_field: a hint on what a function returns is lost when it is inlined.
    return tl.multiple_of(tl.load(segment_table + segment * SEGMENT_FIELDS + FIELD).to(INDEX), 16)


@triton.jit
def segment_tokens(segment_table, segment, FIELD: tl.constexpr, INDEX: tl.constexpr):
    """A segment's first token and the one after its last; FIELD names the first."""
    first = segment_field(segment_table, segment, FIELD, INDEX)
    return first, segment_field(segment_table, segment, FIELD + 1, INDEX)


@triton.jit
def slab_row(segment_table, segment, origin, FIELD: tl.constexpr, INDEX: tl.constexpr):
    """Where a segment's first row begins in a slab whose first element is ``origin`` of the whole batch's."""
    start = tl.load(segment_table + segment * SEGMENT_FIELDS + FIELD) - origin
    return tl.multiple_of(start.to(INDEX), 16)


@triton.jit
def group_start(i_g, slab_elements, INDEX: tl.constexpr):
    """Where a slab's i_g-th group begins."""
    return tl.multiple_of(tl.cast(i_g, INDEX) * slab_elements, 16)


@triton.jit
def part_table(segment_table, num_segments, SHARED: tl.constexpr):
    """The table to read a part of a segment from: a prefix's, of several segments, has it where its own tokens are."""
    if SHARED:
        segment_table += tl.where(num_segments > 1, PREFIX, 0)
    return segment_table


@triton.jit
def segments_of(segment_table, segment, first, SEGMENTS: tl.constexpr, SHARED: tl.constexpr):
    """In how many segments a tile's tokens lie, the first one's among them: all of an example for a SHARED prefix."""
    count = 1
    if SHARED:
        own_first = tl.load(segment_table + segment * SEGMENT_FIELDS + FIRST_TOKEN)
        count = tl.where(first < own_first, SEGMENTS, 1)
    return count


@triton.jit
def range_of(segment_table, example_segment, i_r, SEGMENTS: tl.constexpr, SHARED: tl.constexpr):
    """The segment of an example's i_r-th range of tokens, a SHARED prefix coming first, and its ``part_table``."""
    segment = example_segment + i_r
    if SHARED:
        segment = tl.maximum(segment - 1, example_segment)
        segment_table = part_table(segment_table, tl.where(i_r == 0, SEGMENTS, 1), SHARED)
    return segment, segment_table


@triton.jit
def chosen(values, index):
    """One of a tuple's tensors."""
    value = values[0]
    for n in tl.static_range(1, len(values)):
        value = tl.where(index == n, values[n], value)
    return value


@triton.jit
def shared_denominators(logsumexp, row_maximum, o_l, support_stride, num_supports, m_i, SUPPORTS: tl.constexpr):
    """What the probabilities of a row's keys in several supports have in common.

    The statistics of the support with the smallest denominator, logsumexp and row maximum, and for every one of the
    num_supports the quotient of the smallest by its own, which no overflow can reach; 0 for those beyond.
    """
    b_l = tl.load(logsumexp + o_l, mask=m_i, other=float("inf"))
    b_m = b_l
    if row_maximum is not None:
        b_m = tl.load(row_maximum + o_l, mask=m_i, other=0.0)
    for n in tl.static_range(1, SUPPORTS):
        o_n = o_l + n * support_stride
        b_own = tl.load(logsumexp + o_n, mask=m_i & (n < num_supports), other=float("inf"))
        if row_maximum is None:
            b_l = tl.minimum(b_l, b_own)
        else:
            b_max = tl.load(row_maximum + o_n, mask=m_i & (n < num_supports), other=0.0)
            is_less = (b_max - b_m) * LOG2_E + (b_own - b_l) < 0
            b_l = tl.where(is_less, b_own, b_l)
            b_m = tl.where(is_less, b_max, b_m)
    quotients = ()
    for n in tl.static_range(SUPPORTS):
        o_n = o_l + n * support_stride
        m_n = m_i & (n < num_supports)
        b_quotient = b_l - tl.load(logsumexp + o_n, mask=m_n, other=float("inf"))
        if row_maximum is not None:
            b_quotient += (b_m - tl.load(row_maximum + o_n, mask=m_n, other=0.0)) * LOG2_E
        quotients += (tl.where(m_n, tl.exp2(b_quotient), 0.0),)
    return b_l, b_m, quotients


@triton.jit
def pair_of(
    segment_table,
    example_table,
    num_examples,
    pair,
    SEGMENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
):
    """The example of a pair of tiles, its row tile in the batch, the key segment, its ``part_table``, the column tile.

    PAIRS and ROWS are the example table's columns that count such pairs and row tiles, TOKENS the field of a key
    segment's first token.
    """
    o_e = tl.arange(0, BLOCK_EXAMPLES)
    ends = tl.load(example_table + (o_e + 1) * EXAMPLE_FIELDS + PAIRS, mask=o_e < num_examples, other=2**62)
    example = tl.sum((ends <= pair).to(tl.int32))
    local = (pair - tl.load(example_table + example * EXAMPLE_FIELDS + PAIRS)).to(tl.int32)
    num_tiles = 0
    for r in range(SEGMENTS + SHARED):
        segment, table = range_of(segment_table, example * SEGMENTS, r, SEGMENTS, SHARED)
        first, last = segment_tokens(table, segment, TOKENS, tl.int32)
        num_tiles += tl.cdiv(last - first, BLOCK_N)
    row_tile = tl.load(example_table + example * EXAMPLE_FIELDS + ROWS).to(tl.int32) + local // num_tiles
    column_tile = local % num_tiles
    key_range = 0
    begin = 0
    end = 0
    for r in range(SEGMENTS + SHARED):
        segment, table = range_of(segment_table, example * SEGMENTS, r, SEGMENTS, SHARED)
        first, last = segment_tokens(table, segment, TOKENS, tl.int32)
        end += tl.cdiv(last - first, BLOCK_N)
        key_range += (column_tile >= end).to(tl.int32)
        begin = tl.where(column_tile >= end, end, begin)
    column_tile -= begin
    key_segment, key_table = range_of(segment_table, example * SEGMENTS, key_range, SEGMENTS, SHARED)
    return example, row_tile, key_segment, key_table, column_tile


@triton.jit
def load_rows(
    pointer,
    descriptor,
    first,
    last,
    head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows first .. first + BLOCK of one head of q or k; from ``last`` on anything finite, for the caller to mask."""
    if descriptor is None:
        o_r = tl.arange(0, BLOCK)
        o_d = tl.arange(0, BLOCK_D)
        p_r = pointer + (first * NUM_HEADS + head) * HEAD_DIM + o_r[:, None] * (NUM_HEADS * HEAD_DIM) + o_d[None, :]
        rows = tl.load(p_r, mask=(o_r < last - first)[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D == HEAD_DIM:
        rows = descriptor.load([tl.cast(first, tl.int32), head * HEAD_DIM])
    else:
        rows = descriptor.load([tl.cast(first, tl.int32), head, 0]).reshape(BLOCK, BLOCK_D)
    return rows  # [BLOCK, BLOCK_D]


@triton.jit
def scores(
    b_q,
    k,
    k_descriptor,
    q_first,
    q_last,
    k_first,
    k_last,
    head,
    scale,
    positions,
    slot_of_delta,
    c2p,
    p2c,
    max_delta,
    num_slots,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of a tile [BLOCK_M, BLOCK_N], -inf from k_last on; anything from row q_last on.

    In base 2, ``scale`` having the factor log2(e), which the position bias (DESIGN section 2.2) gets here; EXACT ones
    in base e: the rounding of log2(e) is to meet them when their maximum is gone.
    """
    o_i = tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    m_i = o_i < q_last - q_first
    m_j = o_j < k_last - k_first
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    b_k = load_rows(k, k_descriptor, k_first, k_last, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_D)
    b_s = product(b_q, tl.trans(b_k), None, PRECISION) * scale
    if positions is not None:
        position_i = tl.load(positions + q_first + o_i, mask=m_i, other=0)
        position_j = tl.load(positions + k_first + o_j, mask=m_j, other=0)
        delta = position_i[:, None] - position_j[None, :]
        slot = tl.load(slot_of_delta + tl.minimum(tl.maximum(delta, -max_delta), max_delta) + max_delta)
        if c2p is not None:
            p_i = c2p + (q_first * NUM_HEADS + head) * num_slots + o_i[:, None] * (NUM_HEADS * num_slots)
            b_s += tl.load(p_i + slot, mask=m_i[:, None], other=0.0).to(tl.float32) * (1.0 if EXACT else LOG2_E)
        if p2c is not None:
            p_j = p2c + (k_first * NUM_HEADS + head) * num_slots + o_j[None, :] * (NUM_HEADS * num_slots)
            b_s += tl.load(p_j + slot, mask=m_j[None, :], other=0.0).to(tl.float32) * (1.0 if EXACT else LOG2_E)
    if CAUSAL:
        m_s = (k_first + o_j)[None, :] <= (q_first + o_i)[:, None]
        b_s = tl.where(m_s & m_j[None, :], b_s, float("-inf"))
    else:
        b_s = tl.where(m_j[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """What a matrix product reads of float32 values: the operand, and its value in float32."""
    if dtype != tl.float32:
        operand = x.to(dtype)
        value = operand.to(tl.float32)
    elif PRECISION == "tf32":
        # To nearest on ten bits: the product would cut them, and the sums beside it must see the same values.
        operand = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        value = operand
    else:
        operand = x
        value = x
    return operand, value


@triton.jit
def power_of_two(x):
    """The largest power of two that is not above x >= 0; 1 for 0."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(bits == 0, 1.0, bits.to(tl.float32, bitcast=True))
