"""The specification: every map of an example is materialised, and the formulas of DESIGN section 2 are written out.

A prefix that segments share is repeated in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idrm_kernels import reduction
from idrm_kernels.impl.problem import Attention, LossOptions, LossOutput, MapProblem


class Example:
    """The dense maps of one example.

    Attributes:
        probabilities: (num_heads, tokens, tokens), the student's P.
        student, teacher: (num_head_groups, units, units), U of either side.
        segments: the unit range of every segment within the example.
    """

    def __init__(self, problem: MapProblem, index: int):
        segments = problem.example_segments(index)
        self.problem = problem
        self.units = slice(segments[0].start, segments[-1].stop)
        self.segments = [slice(rows.start - self.units.start, rows.stop - self.units.start) for rows in segments]
        side = problem.student
        self.tokens = unit_tokens(side, self.units)
        self.q, self.k = expanded(side, self.tokens, problem.dtype)
        self.supports = softmax_supports(side, segments, problem.normalization)
        self.membership = membership(side, self.units, problem.dtype)
        self.probabilities = normalized(scores(side, self.tokens, self.q, self.k), self.supports)
        self.student = merged(self.probabilities, self.membership, problem.num_head_groups)
        if problem.maps is None:
            self.teacher = unit_maps(problem, problem.teacher, segments)
        else:
            units = self.units.stop - self.units.start
            self.teacher = problem.maps[index, :, :units, :units].to(problem.dtype)

    def distances(self) -> Tensor:
        """Row distances (num_head_groups, units, segments)."""
        if self.problem.metric == "l2":
            entries = (self.student - self.teacher).square()
        else:
            logarithm = self.student.clamp_min(1e-30).log()
            entries = torch.xlogy(self.teacher, self.teacher) - self.teacher * logarithm - self.teacher + self.student
        distances = torch.stack([entries[..., columns].sum(-1) for columns in self.segments], dim=-1)
        return distances.clamp_min(0)

    def gradients(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """dq and dk per query head (num_heads, tokens, head_dim); coefficients (num_head_groups, units, segments)."""
        if self.problem.metric == "l2":
            d_map = 2 * (self.student - self.teacher)
        else:
            quotient = self.teacher / self.student.clamp_min(1e-30)
            d_map = 1 - torch.where(self.student > 1e-30, quotient, 0.0)
        for y, columns in enumerate(self.segments):
            d_map[..., columns] *= coefficients[..., y, None]
        heads = self.probabilities.shape[0] // self.problem.num_head_groups
        rows = self.membership / self.membership.sum(0)
        d_probabilities = (rows @ d_map @ self.membership.T / heads).repeat_interleave(heads, dim=0)
        d_scores = torch.zeros_like(self.probabilities)
        for support in self.supports:
            p, dp = self.probabilities[..., support], d_probabilities[..., support]
            d_scores[..., support] = p * (dp - (p * dp).sum(-1, keepdim=True))
        scale = self.problem.softmax_scale
        return scale * d_scores @ self.k, scale * d_scores.transpose(1, 2) @ self.q


def expanded(side: Attention, tokens: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k as (num_heads, tokens, head_dim), keys repeated for the query heads that share them."""
    q, k = (tensor[tokens].to(dtype).transpose(0, 1) for tensor in (side.q, side.k))
    return q, k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)


def scores(side: Attention, tokens: slice, q: Tensor, k: Tensor) -> Tensor:
    """The scores before the softmax (num_heads, tokens, tokens)."""
    s = side.softmax_scale * q @ k.transpose(1, 2)
    if side.positions is not None:
        positions = side.positions[tokens].long()
        limit = side.slot_of_delta.numel() // 2
        delta = (positions[:, None] - positions[None, :]).clamp(-limit, limit)
        slots = side.slot_of_delta[delta + limit].long().expand_as(s)
        if side.c2p is not None:
            s = s + side.c2p[tokens].to(s.dtype).transpose(0, 1).gather(2, slots)
        if side.p2c is not None:
            s = s + side.p2c[tokens].to(s.dtype).transpose(0, 1).gather(2, slots.transpose(1, 2)).transpose(1, 2)
    if side.causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    return s


def normalized(s: Tensor, supports: list[slice]) -> Tensor:
    """Softmax over each support's keys."""
    parts = [s[..., support].softmax(-1) for support in supports]
    return torch.cat(parts, dim=-1)


def merged(probabilities: Tensor, units: Tensor, num_head_groups: int) -> Tensor:
    """U (num_head_groups, units, units): heads averaged, keys of a unit summed, rows of a unit averaged."""
    averaged = probabilities.unflatten(0, (num_head_groups, -1)).mean(1)
    return (units / units.sum(0)).T @ averaged @ units


def membership(side: Attention, units: slice, dtype: torch.dtype) -> Tensor:
    """(tokens, units), 1 where the token lies in the unit."""
    offsets = side.device_unit_offsets[units.start : units.stop + 1]
    tokens = unit_tokens(side, units)
    token = torch.arange(tokens.start, tokens.stop, device=offsets.device)[:, None]
    return ((token >= offsets[:-1]) & (token < offsets[1:])).to(dtype)


def unit_tokens(side: Attention, units: slice | range) -> slice:
    """The tokens of consecutive units."""
    return slice(side.unit_offsets[units.start], side.unit_offsets[units.stop])


def softmax_supports(side: Attention, segments: list[range], normalization: str) -> list[slice]:
    """The token ranges within the example that a softmax runs over."""
    first = side.unit_offsets[segments[0].start]
    if normalization == "joint":
        return [slice(0, side.unit_offsets[segments[-1].stop] - first)]
    tokens = [unit_tokens(side, units) for units in segments]
    return [slice(segment.start - first, segment.stop - first) for segment in tokens]


def unit_maps(problem: MapProblem, side: Attention, segments: list[range]) -> Tensor:
    """U of one side (num_head_groups, units, units) for the segments of one example."""
    units = slice(segments[0].start, segments[-1].stop)
    tokens = unit_tokens(side, units)
    s = scores(side, tokens, *expanded(side, tokens, problem.dtype))
    probabilities = normalized(s, softmax_supports(side, segments, problem.normalization))
    return merged(probabilities, membership(side, units, problem.dtype), problem.num_head_groups)


def distance(problem: MapProblem) -> Tensor:
    """Row distances (num_head_groups, total_units, segments)."""
    problem = problem.unshared()
    shape = (problem.num_head_groups, problem.total_units, problem.segments)
    distances = torch.zeros(shape, dtype=problem.dtype, device=problem.q.device)
    for index in range(problem.num_examples):
        example = Example(problem, index)
        distances[:, example.units] = example.distances()
    return distances


def distance_backward(coefficients: Tensor, problem: MapProblem) -> tuple[Tensor, Tensor]:
    """dq and dk for the incoming gradient of the row distances."""
    unshared = problem.unshared()
    dq, dk = unshared.zero_gradients(problem.q.dtype)
    for index in range(problem.num_examples):
        example = Example(unshared, index)
        add_gradients(unshared, example, coefficients[:, example.units], dq, dk)
    return problem.summed_over_segments(dq, dk)


def add_gradients(problem: MapProblem, example: Example, coefficients: Tensor, dq: Tensor, dk: Tensor) -> None:
    """Writes the gradients of one example's tokens."""
    example_dq, example_dk = example.gradients(coefficients)
    dq[example.tokens] = example_dq.transpose(0, 1).to(dq.dtype)
    dk[example.tokens] = example_dk.unflatten(0, (dk.shape[1], -1)).sum(1).transpose(0, 1).to(dk.dtype)


def loss(problem: MapProblem, options: LossOptions) -> LossOutput:
    """The loss and, where asked for, its gradients."""
    intra = torch.zeros((), dtype=problem.dtype, device=problem.q.device)
    inter = torch.zeros_like(intra)
    unshared = problem.unshared()
    dq, dk = unshared.zero_gradients(problem.gradient_dtype, options.needs_grad)
    for index in range(problem.num_examples):
        example = Example(unshared, index)
        distances = example.distances()
        coefficients = torch.zeros_like(distances)
        weights = distances.new_ones(problem.total_units) if options.row_weights is None else options.row_weights
        weights = weights[example.units].to(problem.dtype)
        averaged = problem.num_head_groups * problem.num_examples
        for x, rows in enumerate(example.segments):
            for y, columns in enumerate(example.segments):
                if rows.start == rows.stop or columns.start == columns.stop:
                    continue
                for g in range(problem.num_head_groups):
                    d, w = distances[g, rows, y], weights[rows]
                    block = reduction.block_loss(options.reduction, d, w)
                    factor = reduction.block_factor(options.reduction, block) / averaged
                    factor = factor * (options.intra_weight if x == y else options.inter_weight)
                    coefficients[g, rows, y] = factor * reduction.row_coefficients(options.reduction, d, w, w.sum())
                    if x == y:
                        intra = intra + block / averaged
                    else:
                        inter = inter + block / averaged
        if options.needs_grad:
            add_gradients(unshared, example, coefficients, dq, dk)
    dq, dk = problem.summed_over_segments(dq, dk)
    return LossOutput(options.intra_weight * intra + options.inter_weight * inter, intra, inter, dq, dk)
