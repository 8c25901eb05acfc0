"""The order of the launches: softmax denominators of the batch, then, slab by slab, differences, losses, gradients."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from idrm_kernels.impl.problem import LossOptions, LossOutput, MapProblem
from idrm_kernels.impl.triton.batch import Batch, Gradients


def on_device_of(problem: MapProblem) -> contextlib.AbstractContextManager:
    """Makes the tensors' device the current one, which is where Triton launches."""
    device = problem.q.device
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def distance(problem: MapProblem) -> Tensor:
    """Row distances (num_head_groups, total_units, segments)."""
    shape = (problem.num_head_groups, problem.total_units, problem.segments)
    # Zeros, for a key segment may be empty.
    distances = torch.zeros(shape, dtype=torch.float32, device=problem.q.device)
    if problem.total_units:
        with on_device_of(problem):
            batch = Batch(problem)
            for slab in batch.slabs(needs_difference=False, needs_distances=True):
                batch.compare(slab, needs_difference=False, distances=distances)
    return distances


def distance_backward(coefficients: Tensor, problem: MapProblem) -> tuple[Tensor, Tensor]:
    """dq and dk for the incoming gradient of the row distances."""
    if not problem.total_units:
        return problem.zero_gradients(problem.q.dtype)
    with on_device_of(problem):
        batch = Batch(problem)
        gradients = Gradients(batch, problem.q.dtype)
        coefficients = coefficients.to(torch.float32).contiguous()
        for slab in batch.slabs(needs_difference=True, needs_distances=False):
            difference = batch.compare(slab, needs_difference=True, distances=None)
            batch.gradients(slab, difference, coefficients, gradients)
            # Before the next slab's are made: one slab's differences at a time.
            del difference
    return gradients.dq, gradients.dk


def loss(problem: MapProblem, options: LossOptions) -> LossOutput:
    """The loss and, where asked for, its gradients."""
    if problem.total_units:
        with on_device_of(problem):
            return loss_of(Batch(problem), options)
    scalars = [torch.zeros((), dtype=torch.float32, device=problem.q.device) for _ in range(3)]
    return LossOutput(*scalars, *problem.zero_gradients(problem.gradient_dtype, options.needs_grad))


def loss_of(batch: Batch, options: LossOptions) -> LossOutput:
    """The loss of a batch with units.

    In one sweep where every slab has whole query segments, whose block losses are then known before their gradients;
    else in two, the differences computed again.
    """
    problem = batch.problem
    shape = (problem.num_head_groups, problem.total_units, problem.segments)
    distances = torch.zeros(shape, dtype=torch.float32, device=problem.q.device)
    blocks = (problem.num_head_groups, problem.num_examples * problem.segments, problem.segments)
    losses = torch.zeros(blocks, dtype=torch.float32, device=problem.q.device)
    coefficients = torch.empty_like(distances) if options.needs_grad else None
    if options.row_weights is not None:
        options = options._replace(row_weights=options.row_weights.contiguous())
    gradients = Gradients(batch, problem.gradient_dtype) if options.needs_grad else None
    slabs = batch.slabs(needs_difference=options.needs_grad, needs_distances=True)
    in_one_sweep = options.needs_grad and all(slab.is_whole for slab in slabs)
    if not in_one_sweep:
        for slab in batch.slabs(needs_difference=False, needs_distances=True):
            batch.compare(slab, needs_difference=False, distances=distances)
        for slab in batch.plan.slabs(problem.num_head_groups, 0, 0):
            batch.block_losses(slab, options, distances, losses, coefficients)
    for slab in slabs if options.needs_grad else ():
        difference = batch.compare(slab, needs_difference=True, distances=distances if in_one_sweep else None)
        if in_one_sweep:
            batch.block_losses(slab, options, distances, losses, coefficients)
        batch.gradients(slab, difference, coefficients, gradients)
        del difference
    scalars = batch.total_loss(options, losses)
    if options.needs_grad:
        return LossOutput(*scalars, gradients.dq, gradients.dk)
    return LossOutput(*scalars, *problem.zero_gradients(problem.gradient_dtype, wanted=False))
