"""Fused kernels for GPUs in Triton (docs/kernels.md); on a CPU under Triton's interpreter, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from idrm_kernels.impl.triton.configurations import MAX_HEAD_DIM
from idrm_kernels.impl.triton.primitives import INTERPRETED
from idrm_kernels.impl.triton.sweep import distance, distance_backward, loss

__all__ = ["distance", "distance_backward", "is_usable", "loss", "obstacle"]


def is_usable() -> bool:
    """Whether any tensor here can be computed with."""
    return torch.cuda.is_available() or INTERPRETED.value


def obstacle(q: Tensor, teacher_q: Tensor | None) -> str | None:
    """Why the kernels cannot take a student's and a teacher's queries; None where they can."""
    if q.device.type != "cuda" and not (INTERPRETED.value and q.device.type == "cpu"):
        return f"expected tensors on a CUDA or ROCm device, got them on {q.device}"
    for name, tensor in (("student.q", q), ("teacher.q", teacher_q)):
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return f"expected float32, bfloat16 or float16, got {name} of {tensor.dtype}"
        if tensor.shape[2] > MAX_HEAD_DIM:
            return f"expected a head_dim of at most {MAX_HEAD_DIM}, got {tensor.shape[2]} of {name}"
    return None
