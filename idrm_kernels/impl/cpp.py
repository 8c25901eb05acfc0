"""The compiled kernel for CPUs, ``idrm_kernels._C`` (docs/kernels.md, "The CPU kernel"): its calls.

Importing this module raises ImportError where the extension was not built.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Importing the extension registers its op.
from idrm_kernels import _C  # noqa: F401
from idrm_kernels.impl.problem import LossOptions, LossOutput, MapProblem
from idrm_kernels.reduction import REDUCTIONS

# In the order of idrm::Task in csrc/problem.h; reductions are numbered as REDUCTIONS names them.
TASKS = ("distance", "distance_backward", "loss")


def obstacle(q: Tensor, teacher_q: Tensor | None) -> str | None:
    """Why the kernel cannot take a student's and a teacher's queries; None where it can."""
    return None if q.device.type == "cpu" else f"expected tensors on the CPU, got them on {q.device}"


def capability() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16".

    The best one of this CPU, or the one that IDRM_KERNELS_CPU_CAPABILITY named before the first call; RuntimeError if
    there is none of that name here.
    """
    return torch.ops.idrm_kernels_cpp.capability()


def release_memory() -> None:
    """Hands back the buffers, 256 MiB at most, that the process keeps from one call to the next."""
    torch.ops.idrm_kernels_cpp.release_memory()


def distance(problem: MapProblem) -> Tensor:
    """Row distances (num_head_groups, total_units, segments)."""
    return _run(problem, "distance", None, None).distances


def distance_backward(coefficients: Tensor, problem: MapProblem) -> tuple[Tensor, Tensor]:
    """dq and dk for the incoming gradient of the row distances."""
    output = _run(problem, "distance_backward", coefficients, None)
    return output.dq.to(problem.q.dtype), output.dk.to(problem.k.dtype)


def loss(problem: MapProblem, options: LossOptions) -> LossOutput:
    """The loss and, where asked for, its gradients, in one sweep."""
    output = _run(problem, "loss", None, options)
    intra, inter = output.losses.to(problem.dtype)
    return LossOutput(
        options.intra_weight * intra + options.inter_weight * inter, intra.clone(), inter.clone(), output.dq, output.dk
    )


class _Output:
    """Buffers that the kernel fills: distances, gradients (empty where there are none), losses (intra, inter)."""

    def __init__(self, problem: MapProblem, needs_grad: bool):
        shape = (problem.num_head_groups, problem.total_units, problem.segments)
        self.distances = torch.zeros(shape, dtype=problem.dtype)
        inputs = (problem.q, problem.k) if needs_grad else (problem.q[:0], problem.k[:0])
        self.dq, self.dk = (torch.zeros(tensor.shape, dtype=problem.gradient_dtype) for tensor in inputs)
        self.losses = torch.zeros(2, dtype=torch.float64)


def _run(problem: MapProblem, task: str, coefficients: Tensor | None, options: LossOptions | None) -> _Output:
    needs_grad = task == "distance_backward" if options is None else options.needs_grad
    output = _Output(problem, needs_grad)
    weights = None if options is None or options.row_weights is None else options.row_weights
    torch.ops.idrm_kernels_cpp.run(
        *(_operand(tensor, problem.dtype) for tensor in (problem.q, problem.k, problem.teacher_q, problem.teacher_k)),
        _contiguous(problem.positions),
        _contiguous(problem.slot_of_delta),
        _contiguous(problem.c2p),
        _contiguous(problem.p2c),
        _contiguous(problem.maps),
        problem.cu_units,
        problem.unit_offsets,
        problem.teacher_unit_offsets,
        problem.shared_units,
        _contiguous(weights, problem.dtype),
        _contiguous(coefficients, problem.dtype),
        output.distances,
        output.dq,
        output.dk,
        output.losses,
        problem.segments,
        problem.softmax_scale,
        problem.teacher_softmax_scale,
        problem.causal,
        problem.teacher_causal,
        problem.metric == "kl",
        problem.normalization == "joint",
        problem.num_head_groups,
        problem.workspace_bytes,
        TASKS.index(task),
        0 if options is None else REDUCTIONS.index(options.reduction),
        1.0 if options is None else options.intra_weight,
        1.0 if options is None else options.inter_weight,
        needs_grad,
    )
    return output


def _operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Queries or keys: two bytes a number as they are, unless products are to be taken in float64; others converted."""
    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return tensor.contiguous()
    return _contiguous(tensor, dtype)


def _contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()
