"""What every launch needs: one side's tensors as kernel arguments, tensor descriptors, the type of offsets."""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from idrm_kernels.impl.problem import MapProblem
from idrm_kernels.impl.triton.configurations import Configuration, block_d, uses_descriptors
from idrm_kernels.tiles import ExampleField, Section, SegmentField


def run(kernel: triton.JITFunction, grid: tuple[int, ...], **arguments) -> None:
    """Launches a kernel."""
    kernel[grid](**arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One model's attention as kernels take it, and where the plan keeps its tokens."""

    q: Tensor
    k: Tensor
    softmax_scale: float
    causal: bool
    positions: Tensor | None
    slot_of_delta: Tensor | None
    c2p: Tensor | None
    p2c: Tensor | None
    is_teacher: bool
    _descriptors: dict[tuple[str, int], TensorDescriptor | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def student(cls, problem: MapProblem) -> Side:
        """The student's side."""
        q, k = problem.q.contiguous(), problem.k.contiguous()
        return cls(q, k, problem.softmax_scale, problem.causal, None, None, None, None, False)

    @classmethod
    def teacher(cls, problem: MapProblem) -> Side:
        """The teacher's side; only where its maps are not stored."""
        tensors = (
            problem.teacher_q,
            problem.teacher_k,
            problem.positions,
            problem.slot_of_delta,
            problem.c2p,
            problem.p2c,
        )
        q, k, *bias = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        return cls(q, k, problem.teacher_softmax_scale, problem.teacher_causal, *bias, True)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        """Of q and k."""
        return self.q.shape[2]

    @property
    def has_bias(self) -> bool:
        """Whether scores have a position bias."""
        return self.c2p is not None or self.p2c is not None

    @property
    def precision(self) -> str:
        """Of matrix products of float32 tensors; others have but one."""
        # What both of torch's interfaces set; the getter of the older one raises once the newer was used.
        is_tf32 = self.q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if is_tf32 and torch.version.hip is None else "ieee"

    @property
    def rows(self) -> dict[int, Section]:
        """The sections of its row tiles."""
        if self.is_teacher:
            return {64: Section.TEACHER_ROWS_64, 128: Section.TEACHER_ROWS_128}
        return {64: Section.ROWS_64, 128: Section.ROWS_128}

    @property
    def first_token(self) -> int:
        """The segment table's column of its tokens."""
        return int(SegmentField.TEACHER_FIRST_TOKEN if self.is_teacher else SegmentField.FIRST_TOKEN)

    @property
    def arithmetic(self) -> str:
        """The kind of its products, which the configuration of a kernel depends on."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.q.dtype, self.precision)

    def operands(self, own: Configuration, arch: str) -> dict:
        """q and k, and where the architecture has tensor descriptors, theirs for the configuration's tiles."""
        arguments = {"q": self.q, "k": self.k}
        for name, block in (("q", own.block_m), ("k", own.block_n)):
            if (name, block) not in self._descriptors:
                self._descriptors[name, block] = self._descriptor(arguments[name], block, arch)
            arguments[f"{name}_descriptor"] = self._descriptors[name, block]
        return arguments

    def _descriptor(self, tensor: Tensor, block: int, arch: str) -> TensorDescriptor | None:
        aligned = tensor.data_ptr() % 16 == 0 and self.head_dim * tensor.itemsize % 16 == 0
        # Products in full float32 are no tensor core's: they read shared memory better as pointers fill it.
        if not uses_descriptors(arch) or self.is_exact or not aligned:
            return None
        width = block_d(self.head_dim)
        if width == self.head_dim:
            return TensorDescriptor.from_tensor(tensor.flatten(1), [block, width])
        return TensorDescriptor.from_tensor(tensor, [block, 1, width])

    def bias(self) -> dict:
        """The position bias; None where there is none."""
        tables = {"positions": None, "slot_of_delta": None, "c2p": None, "p2c": None, "max_delta": 0, "num_slots": 0}
        if self.has_bias:
            tables.update(positions=self.positions, slot_of_delta=self.slot_of_delta, c2p=self.c2p, p2c=self.p2c)
            table = self.p2c if self.c2p is None else self.c2p
            tables.update(max_delta=self.slot_of_delta.numel() // 2, num_slots=table.shape[2])
        return tables

    def shape(self, num_head_groups: int | None = None) -> dict:
        """Head counts and what else a kernel is compiled for."""
        constants = {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.k.shape[1],
            "HEAD_DIM": self.head_dim,
            "CAUSAL": self.causal,
            "PRECISION": self.precision,
            "BLOCK_D": block_d(self.head_dim),
        }
        if num_head_groups is not None:
            constants["HEADS"] = self.num_heads // num_head_groups
        return constants

    @property
    def is_exact(self) -> bool:
        """Whether float32 is to be float32 throughout."""
        return self.q.dtype == torch.float32 and self.precision == "ieee"

    @property
    def score_scale(self) -> float:
        """The factor of q.k: scores are in base 2, exact ones in base e."""
        return self.softmax_scale * (1.0 if self.is_exact else math.log2(math.e))

    @property
    def staging(self) -> dict:
        """Where the plan keeps what ``head_mean`` reads."""
        prefix = "TEACHER_" if self.is_teacher else ""
        return {
            "TOKENS": self.first_token,
            "COLUMNS": int(SegmentField[f"{prefix}COLUMN"]),
            "WIDTHS": int(SegmentField[f"{prefix}WIDTH"]),
            "ORIGINS": int(SegmentField[f"{prefix}SLOT_ORIGIN"]),
            "RUNS": int(ExampleField[f"{prefix}RUNS"]),
        }


def index_type(problem: MapProblem, elements: int) -> tl.dtype:
    """The type of offsets: 64 bits where a tensor, or a workspace of so many elements, asks for them."""
    tensors = (problem.q, problem.k, problem.teacher_q, problem.teacher_k, problem.c2p, problem.p2c, problem.maps)
    statistics = problem.segments * problem.q.shape[0] * problem.q.shape[1]
    if problem.teacher_q is not None:
        statistics = max(statistics, problem.segments * problem.teacher_q.shape[0] * problem.teacher_q.shape[1])
    largest = max(elements, statistics, *(tensor.numel() for tensor in tensors if tensor is not None))
    return tl.int64 if largest >= 2**31 else tl.int32
