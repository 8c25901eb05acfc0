"""An independent oracle in plain differentiable PyTorch: loops over examples, heads and units; for small cases."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from idrm_kernels.inputs import PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout


def token_scores(model: PackedAttention, head: int, queries: range, keys: range) -> Tensor:
    """Scores before the softmax of some tokens (queries, keys) for one query head."""
    kv_head = head // (model.q.shape[1] // model.k.shape[1])
    scores = model.scale * model.q[queries.start : queries.stop, head] @ model.k[keys.start : keys.stop, kv_head].T
    if model.position_bias is not None:
        bias = model.position_bias
        limit = (len(bias.slot_of_delta) - 1) // 2
        extra = torch.zeros_like(scores)
        for row, i in enumerate(queries):
            for column, j in enumerate(keys):
                delta = max(-limit, min(limit, int(bias.positions[i]) - int(bias.positions[j])))
                slot = int(bias.slot_of_delta[delta + limit])
                if bias.c2p is not None:
                    extra[row, column] += bias.c2p[i, head, slot]
                if bias.p2c is not None:
                    extra[row, column] += bias.p2c[j, head, slot]
        scores = scores + extra
    if model.causal:
        mask = torch.tensor([[j > i for j in keys] for i in queries], dtype=torch.bool).reshape(scores.shape)
        scores = scores.masked_fill(mask, -torch.inf)
    return scores


def unit_map(model: PackedAttention, units: list[range], supports: list[list[int]], heads: range) -> Tensor:
    """The merged map of one example, heads averaged (units, units); supports: the units that a softmax runs over."""
    tokens = range(units[0].start, units[-1].stop)
    first = tokens.start
    columns = torch.zeros(len(heads), len(tokens), len(units), dtype=model.q.dtype)
    for index, head in enumerate(heads):
        parts = []
        for support in supports:
            keys = range(units[support[0]].start, units[support[-1]].stop)
            probabilities = token_scores(model, head, tokens, keys).softmax(-1)
            for unit in support:
                own = slice(units[unit].start - keys.start, units[unit].stop - keys.start)
                parts.append(probabilities[:, own].sum(-1))
        columns[index] = torch.stack(parts, dim=1)
    averaged = columns.mean(0)
    return torch.stack([averaged[unit.start - first : unit.stop - first].mean(0) for unit in units])


def example_units(layout: MapLayout, example: int, teacher_side: bool) -> tuple[list[range], list[list[int]]]:
    """Token ranges of an example's units, and the units of each segment, counted within the example."""
    offsets = (layout.teacher_unit_offsets if teacher_side else layout.unit_offsets).tolist()
    bounds = layout.cu_units[example * layout.segments : (example + 1) * layout.segments + 1].tolist()
    units = [range(offsets[unit], offsets[unit + 1]) for unit in range(bounds[0], bounds[-1])]
    segments = [list(range(a - bounds[0], b - bounds[0])) for a, b in itertools.pairwise(bounds)]
    return units, segments


def repeated(student: PackedAttention, layout: MapLayout) -> PackedAttention:
    """The student with a prefix that segments share once in every segment."""
    if layout.device_token_index is None:
        return student
    q, k = (tensor[layout.device_token_index] for tensor in (student.q, student.k))
    return dataclasses.replace(student, q=q, k=k)


def oracle_distance(
    student: PackedAttention,
    teacher: PackedAttention | StoredMaps,
    layout: MapLayout,
    *,
    metric: str = "l2",
    normalization: str = "block",
    num_head_groups: int = 1,
) -> Tensor:
    """What ``attention_map_distance`` returns, by autograd through materialised maps."""
    student = repeated(student, layout)
    rows = []
    for example in range(layout.num_examples):
        units, segments = example_units(layout, example, teacher_side=False)
        teacher_units, _ = example_units(layout, example, teacher_side=True)
        if not units:
            continue
        supports = [list(range(len(units)))] if normalization == "joint" else [units for units in segments if units]
        groups = []
        for group in range(num_head_groups):
            heads = student.q.shape[1] // num_head_groups
            own = unit_map(student, units, supports, range(group * heads, (group + 1) * heads))
            if isinstance(teacher, StoredMaps):
                target = teacher.maps[example, group, : len(units), : len(units)].to(own.dtype)
            else:
                heads = teacher.q.shape[1] // num_head_groups
                target = unit_map(teacher, teacher_units, supports, range(group * heads, (group + 1) * heads)).to(own)
            if metric == "l2":
                entries = (own - target) ** 2
            else:
                entries = torch.xlogy(target, target) - target * own.clamp_min(1e-30).log() - target + own
            groups.append(torch.stack([entries[:, columns].sum(1) for columns in segments], dim=1).clamp_min(0))
        rows.append(torch.stack(groups))
    if not rows:
        return student.q.new_zeros(num_head_groups, 0, layout.segments)
    return torch.cat(rows, dim=1)


def oracle_loss(
    distances: Tensor,
    layout: MapLayout,
    *,
    reduction: str = "frobenius",
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """What ``attention_map_loss`` returns as loss, from the oracle's distances."""
    weights = distances.new_ones(layout.total_units) if row_weights is None else row_weights.to(distances)
    total = distances.new_zeros(())
    for example in range(layout.num_examples):
        bounds = layout.cu_units[example * layout.segments : (example + 1) * layout.segments + 1].tolist()
        for x in range(layout.segments):
            for y in range(layout.segments):
                rows = slice(bounds[x], bounds[x + 1])
                if bounds[x] == bounds[x + 1] or bounds[y] == bounds[y + 1]:
                    continue
                if row_weights is not None and weights[rows].sum() == 0:
                    continue
                for group in distances:
                    d, w = group[rows, y], weights[rows]
                    if reduction == "frobenius":
                        block = _sqrt((w * d).sum())
                    elif reduction == "row":
                        block = (w * _sqrt(d)).sum() / w.sum()
                    else:
                        block = (w * d).sum() / w.sum()
                    total = total + (intra_weight if x == y else inter_weight) * block / len(distances)
    return total / max(layout.num_examples, 1)


def _sqrt(values: Tensor) -> Tensor:
    """The square root with derivative 0 at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)
