"""From row distances to the blocks' losses, the rows' coefficients and the three scalars; work linear in rows."""

from __future__ import annotations

import triton
import triton.language as tl

from idrm_kernels.impl.triton.primitives import FIRST_UNIT, segment_tokens

# The square of 8 roundings of float32.
ROUNDING = tl.constexpr(1e-12)


@triton.jit
def row_values(distances, row_weights, o_a, m_a, i_g, i_y, total_units, SEGMENTS: tl.constexpr):
    """Distances and weights of some rows of a block; 0 beyond."""
    b_d = tl.load(distances + (i_g * total_units + o_a) * SEGMENTS + i_y, mask=m_a, other=0.0)
    if row_weights is None:
        b_w = m_a.to(tl.float32)
    else:
        b_w = tl.load(row_weights + o_a, mask=m_a, other=0.0).to(tl.float32)
    return b_d, b_w


@triton.jit(
    do_not_specialize=[
        "first_segment",
        "first_group",
        "num_segments",
        "total_units",
        "averaged",
    ]
)
def block_loss_fwd_kernel(
    distances,
    row_weights,
    losses,
    coefficients,
    segment_table,
    first_segment,
    first_group,
    num_segments,
    total_units,
    intra_weight,
    inter_weight,
    averaged,
    SEGMENTS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program has one block (DESIGN section 2, "Loss").

    distances and coefficients (num_head_groups, total_units, segments), losses (num_head_groups, num_segments,
    segments); coefficients, the derivatives of the whole loss by the distances, may be None.
    """
    segment = first_segment + tl.program_id(0)
    i_y = tl.program_id(1)
    i_g = (first_group + tl.program_id(2)).to(INDEX)
    first, last = segment_tokens(segment_table, segment, FIRST_UNIT, INDEX)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    for a in range(first, last, BLOCK_M):
        o_a = a + tl.arange(0, BLOCK_M)
        b_d, b_w = row_values(distances, row_weights, o_a, o_a < last, i_g, i_y, total_units, SEGMENTS)
        if REDUCTION == "row":
            b_d = tl.sqrt_rn(b_d)
        b_total += b_w * b_d
        b_weight += b_w
    total = tl.sum(b_total)
    weight = tl.sum(b_weight)
    if REDUCTION == "frobenius":
        loss = tl.sqrt_rn(total)
        factor = tl.where(loss > 0, 0.5 / tl.where(loss > 0, loss, 1.0), 0.0)
    else:
        factor = tl.where(weight > 0, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)
        loss = tl.where(weight > 0, total / tl.where(weight > 0, weight, 1.0), 0.0)
    tl.store(losses + (i_g * num_segments + segment) * SEGMENTS + i_y, loss)
    if coefficients is not None:
        intra = segment % SEGMENTS == i_y
        factor *= tl.where(intra, tl.cast(intra_weight, tl.float32), tl.cast(inter_weight, tl.float32)) / averaged
        for a in range(first, last, BLOCK_M):
            o_a = a + tl.arange(0, BLOCK_M)
            b_d, b_w = row_values(distances, row_weights, o_a, o_a < last, i_g, i_y, total_units, SEGMENTS)
            if REDUCTION == "row":
                # Below it a distance is what rounding left of equal rows, and its root's derivative noise.
                differs = b_d > ROUNDING
                b_w = tl.where(differs, 0.5 * b_w / tl.sqrt_rn(tl.where(differs, b_d, 1.0)), 0.0)
            tl.store(coefficients + (i_g * total_units + o_a) * SEGMENTS + i_y, factor * b_w, mask=o_a < last)


@triton.jit(
    do_not_specialize=[
        "num_blocks",
        "num_segments",
        "averaged",
    ]
)
def total_loss_fwd_kernel(
    losses,
    loss,
    intra,
    inter,
    num_blocks,
    num_segments,
    intra_weight,
    inter_weight,
    averaged,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The three scalars of MapLoss from losses (num_head_groups, num_segments, segments); one program."""
    b_intra = tl.zeros([BLOCK], dtype=tl.float32)
    b_inter = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, num_blocks, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_l = tl.load(losses + o_b, mask=o_b < num_blocks, other=0.0)
        own = (o_b // SEGMENTS) % num_segments % SEGMENTS == o_b % SEGMENTS
        b_intra += tl.where(own, b_l, 0.0)
        b_inter += tl.where(own, 0.0, b_l)
    total_intra = tl.sum(b_intra) / averaged
    total_inter = tl.sum(b_inter) / averaged
    tl.store(intra, total_intra)
    tl.store(inter, total_inter)
    tl.store(loss, tl.cast(intra_weight, tl.float32) * total_intra + tl.cast(inter_weight, tl.float32) * total_inter)
