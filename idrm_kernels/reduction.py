"""From row distances to the loss of a block and to the derivative of either (DESIGN section 2, "Loss")."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from idrm_kernels.layout import MapLayout

REDUCTIONS = ("frobenius", "row", "row_sq")


def block_loss(reduction: str, distances: Tensor, weights: Tensor) -> Tensor:
    """The losses of blocks with the same rows: (...) from distances (rows, ...) and weights that broadcast to them."""
    if reduction == "frobenius":
        return (weights * distances).sum(0).sqrt()
    rows = distances.sqrt() if reduction == "row" else distances
    total = weights.sum(0)
    return torch.where(total > 0, (weights * rows).sum(0) / total, 0.0)


def row_coefficients(reduction: str, distances: Tensor, weights: Tensor, total_weight: Tensor) -> Tensor:
    """d block_loss / d distances (rows, ...) for some rows of blocks whose weights sum to total_weight.

    For "frobenius" only the part that is known before the block's sum is; ``block_factor`` is the other.
    """
    if reduction == "frobenius":
        return weights.expand_as(distances)
    if reduction == "row":
        weights = torch.where(distances > 0, 0.5 * weights * distances.rsqrt(), 0.0)
    return torch.where(total_weight > 0, weights / total_weight, 0.0).expand_as(distances)


def block_factor(reduction: str, loss: Tensor) -> Tensor:
    """What the gradient of a whole block is still to be multiplied with once its loss is known, one value a loss."""
    if reduction == "frobenius":
        return torch.where(loss > 0, 0.5 / loss, 0.0)
    return torch.ones_like(loss)


def example_losses(
    distances: Tensor, layout: MapLayout, *, reduction: str = "frobenius", row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Intra and inter losses of every example, from the row distances of ``attention_map_distance``.

    Args:
        distances: (num_head_groups, total_units, segments).
        layout: the layout the distances were made with.
        reduction: "frobenius", "row" or "row_sq".
        row_weights: (total_units,), default 1.

    Returns:
        Two tensors (num_examples,) of the distances' dtype: the sum over the blocks x = y, and over x != y, mean over
        the head groups, unweighted. Their weighted sum, averaged over the examples, is ``attention_map_loss``. For
        values: autograd through a square root at 0 gives NaN here, where the loss op's gradient is 0.
    """
    weights = distances.new_ones(layout.total_units) if row_weights is None else row_weights.detach().to(distances)
    cu_units = layout.cu_units.tolist()
    intra = [distances.new_zeros(()) for _ in range(layout.num_examples)]
    inter = [distances.new_zeros(()) for _ in range(layout.num_examples)]
    for segment, (first, last) in enumerate(itertools.pairwise(cu_units)):
        example, x = divmod(segment, layout.segments)
        for y in range(layout.segments):
            key_segment = example * layout.segments + y
            if first == last or cu_units[key_segment] == cu_units[key_segment + 1]:
                continue
            blocks = [block_loss(reduction, group[first:last, y], weights[first:last]) for group in distances]
            losses = intra if x == y else inter
            losses[example] = losses[example] + torch.stack(blocks).mean()
    empty = distances.new_zeros(0)
    return (torch.stack(intra), torch.stack(inter)) if intra else (empty, empty)
