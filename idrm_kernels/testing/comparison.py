"""What tests compare: an implementation, what a user would write in plain PyTorch, and the rule that bounds errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from idrm_kernels.api import attention_map_distance, attention_map_loss
from idrm_kernels.inputs import PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout
from idrm_kernels.testing.cases import Case, Problem, error_bound, make_problem
from idrm_kernels.testing.oracle import oracle_distance, oracle_loss, repeated


def outputs(
    problem: Problem, compute_distance: Callable[[Problem], Tensor], compute_loss: Callable[[Problem], Tensor]
) -> dict[str, Tensor]:
    """Distance, its gradients under random weights, the loss and its gradients."""
    problem, q, k = problem.leaves()
    loss = compute_loss(problem)
    # Without any rows an oracle's graph does not reach q and k.
    unreached = 0 * (q.sum() + k.sum())
    loss_gradients = torch.autograd.grad(loss + unreached, (q, k), retain_graph=True)
    distance = compute_distance(problem)
    generator = torch.Generator().manual_seed(7)
    incoming = torch.randn(distance.shape, generator=generator, dtype=torch.float64).to(distance)
    distance_gradients = torch.autograd.grad((distance * incoming).sum() + unreached, (q, k))
    names = ("loss", "loss_dq", "loss_dk", "distance", "distance_dq", "distance_dk")
    return dict(zip(names, (loss.detach(), *loss_gradients, distance.detach(), *distance_gradients), strict=True))


def implementation_outputs(problem: Problem, case: Case, impl: str, **options) -> dict[str, Tensor]:
    """``outputs`` of an implementation."""

    def loss(problem: Problem) -> Tensor:
        return attention_map_loss(
            problem.student,
            problem.teacher,
            problem.layout,
            row_weights=problem.row_weights,
            impl=impl,
            **case.map_options,
            **case.loss_options,
            **options,
        ).loss

    def distance(problem: Problem) -> Tensor:
        return attention_map_distance(
            problem.student, problem.teacher, problem.layout, impl=impl, **case.map_options, **options
        )

    return outputs(problem, distance, loss)


def naive_outputs(problem: Problem, case: Case) -> dict[str, Tensor]:
    """``outputs`` of what a user would write: products in the inputs' dtype, softmax in float32, maps held."""

    def distance(problem: Problem) -> Tensor:
        return naive_distance(problem.student, problem.teacher, problem.layout, **case.map_options)

    def loss(problem: Problem) -> Tensor:
        return oracle_loss(distance(problem), problem.layout, row_weights=problem.row_weights, **case.loss_options)

    return outputs(problem, distance, loss)


def naive_loss(
    student: PackedAttention, teacher: PackedAttention | StoredMaps, layout: MapLayout, **map_options
) -> Tensor:
    """The ``frobenius`` loss that ``attention_map_loss`` returns, with every map of an example in memory."""
    return oracle_loss(naive_distance(student, teacher, layout, **map_options), layout)


def naive_distance(
    student: PackedAttention,
    teacher: PackedAttention | StoredMaps,
    layout: MapLayout,
    *,
    metric: str = "l2",
    normalization: str = "block",
    num_head_groups: int = 1,
) -> Tensor:
    """What ``attention_map_distance`` returns, with every map of an example in memory."""
    student = repeated(student, layout)
    parts = []
    for example in range(layout.num_examples):
        own = naive_map(student, layout, example, False, normalization, num_head_groups)
        if isinstance(teacher, StoredMaps):
            target = teacher.maps[example, :, : own.shape[-1], : own.shape[-1]].float()
        else:
            target = naive_map(teacher, layout, example, True, normalization, num_head_groups)
        if metric == "l2":
            entries = (own - target).square()
        else:
            log_ratio = target.clamp_min(1e-30).log() - own.clamp_min(1e-30).log()
            entries = target * log_ratio - target + own
        widths = layout.cu_units[example * layout.segments : (example + 1) * layout.segments + 1].diff().tolist()
        parts.append(torch.stack([block.sum(-1) for block in entries.split(widths, dim=-1)], dim=-1).clamp_min(0))
    if not parts:
        return oracle_distance(student, teacher, layout, num_head_groups=num_head_groups)
    return torch.cat(parts, dim=1)


def naive_map(
    attention: PackedAttention,
    layout: MapLayout,
    example: int,
    teacher_side: bool,
    normalization: str,
    num_head_groups: int,
) -> Tensor:
    """One side's merged and averaged map of an example (num_head_groups, units, units) float32."""
    tokens, counts, supports = _geometry(layout, example, teacher_side, normalization)
    q = attention.q[tokens].transpose(0, 1)
    k = attention.k[tokens].transpose(0, 1).repeat_interleave(len(q) // attention.k.shape[1], dim=0)
    scores = torch.matmul(q, k.transpose(1, 2)).mul_(attention.scale).float()
    if attention.position_bias is not None:
        bias = attention.position_bias
        limit = len(bias.slot_of_delta) // 2
        delta = (bias.positions[tokens, None] - bias.positions[None, tokens]).long().clamp(-limit, limit)
        slots = bias.slot_of_delta[delta + limit].long().expand_as(scores)
        if bias.c2p is not None:
            scores = scores + bias.c2p[tokens].transpose(0, 1).float().gather(2, slots)
        if bias.p2c is not None:
            p2c = bias.p2c[tokens].transpose(0, 1).float()
            scores = scores + p2c.gather(2, slots.transpose(1, 2)).transpose(1, 2)
    if attention.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    # Averaged over heads before they are put together: the fewest copies of all heads' maps.
    parts = [scores[..., a:b].softmax(-1).unflatten(0, (num_head_groups, -1)).mean(1) for a, b in supports]
    p = torch.cat(parts, dim=-1)
    if len(counts) == len(q[0]):
        return p
    counts = counts.to(p.device)
    unit = torch.repeat_interleave(counts, output_size=p.shape[-1])
    columns = p.new_zeros(*p.shape[:2], len(counts)).index_add(2, unit, p)
    rows = p.new_zeros(len(p), len(counts), len(counts)).index_add(1, unit, columns)
    return rows / counts[:, None]


@torch.compiler.disable
def _geometry(
    layout: MapLayout, example: int, teacher_side: bool, normalization: str
) -> tuple[slice, Tensor, list[tuple[int, int]]]:
    """An example's tokens, its units' token counts, and the key ranges, from its first token, of the softmax."""
    offsets = layout.teacher_unit_offsets if teacher_side else layout.unit_offsets
    bounds = layout.cu_units[example * layout.segments : (example + 1) * layout.segments + 1]
    units = offsets[bounds[0] : bounds[-1] + 1]
    tokens = slice(int(units[0]), int(units[-1]))
    starts = (offsets[bounds] - tokens.start).tolist()
    supports = list(itertools.pairwise(starts)) if normalization == "block" else [(0, starts[-1])]
    return tokens, units.diff(), supports


def check_errors(case: Case, impl: str, device: torch.device, eps: float | None = None) -> None:
    """Values and gradients against float64: at most twice the error of plain PyTorch in the case's dtype.

    PyTorch as a user would write it, or as ``reference`` does with products in float32, whichever errs more; ``eps`` is
    for products that round more than the dtype does. Raises AssertionError.
    """
    problem = make_problem(case, device)
    exact = implementation_outputs(problem.to(torch.float64), case, "reference")
    versions = naive_outputs(problem, case), implementation_outputs(problem, case, "reference")
    for output, value in implementation_outputs(problem, case, impl).items():
        assert value.dtype == (case.dtype if output.endswith(("dq", "dk")) else torch.float32), output
        assert value.shape == exact[output].shape, output
        if not value.numel():
            continue
        bound = max(
            error_bound(version[output], exact[output], torch.finfo(case.dtype).eps if eps is None else eps)
            for version in versions
        )
        error = (value.double() - exact[output]).abs().max()
        assert error <= bound, f"{output}: error {error:.3g} above {bound:.3g}"
