"""The flat arguments of a registered op, named once; every implementation reads its problem from here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMA = (
    "Tensor q, Tensor k, Tensor? teacher_q, Tensor? teacher_k, Tensor? positions, Tensor? slot_of_delta, Tensor? c2p, "
    "Tensor? p2c, Tensor? maps, Tensor cu_units, Tensor unit_offsets, Tensor teacher_unit_offsets, "
    "Tensor device_unit_offsets, Tensor teacher_device_unit_offsets, Tensor shared_units, Tensor? token_index, "
    "Tensor? device_token_index, Tensor plan, Tensor device_plan, "
    "int segments, float softmax_scale, float teacher_softmax_scale, bool causal, bool teacher_causal, "
    "str metric, str normalization, int num_head_groups, int workspace_bytes"
)
LOSS_SCHEMA = "Tensor? row_weights, str reduction, float intra_weight, float inter_weight, bool needs_grad"


class Attention(NamedTuple):
    """One side of a problem: what PackedAttention holds, with the default scale filled in."""

    q: Tensor
    k: Tensor
    softmax_scale: float
    causal: bool
    positions: Tensor | None
    slot_of_delta: Tensor | None
    c2p: Tensor | None
    p2c: Tensor | None
    unit_offsets: list[int]
    device_unit_offsets: Tensor
    token_index: Tensor | None

    def row(self, token: int) -> int:
        """Where q and k hold a token."""
        return token if self.token_index is None else int(self.token_index[token])


@dataclasses.dataclass(frozen=True, eq=False)
class MapProblem:
    """Student, teacher and layout, in the order of SCHEMA; the counts as MapLayout describes them."""

    q: Tensor
    k: Tensor
    teacher_q: Tensor | None
    teacher_k: Tensor | None
    positions: Tensor | None
    slot_of_delta: Tensor | None
    c2p: Tensor | None
    p2c: Tensor | None
    maps: Tensor | None
    cu_units: Tensor
    unit_offsets: Tensor
    teacher_unit_offsets: Tensor
    device_unit_offsets: Tensor
    teacher_device_unit_offsets: Tensor
    shared_units: Tensor
    token_index: Tensor | None
    device_token_index: Tensor | None
    plan: Tensor
    device_plan: Tensor
    segments: int
    softmax_scale: float
    teacher_softmax_scale: float
    causal: bool
    teacher_causal: bool
    metric: str
    normalization: str
    num_head_groups: int
    workspace_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, and the dtype of the distances."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What unscaled gradients wait in for the incoming scalar: float16 would underflow under a loss scale."""
        return torch.float32 if self.q.dtype == torch.float16 else self.q.dtype

    def zero_gradients(self, dtype: torch.dtype, wanted: bool = True) -> tuple[Tensor, Tensor]:
        """Zeros shaped as q and k, contiguous however these are strided; empty where no gradients are wanted."""
        shapes = (tensor.shape if wanted else (0, *tensor.shape[1:]) for tensor in (self.q, self.k))
        dq, dk = (self.q.new_zeros(shape, dtype=dtype) for shape in shapes)
        return dq, dk

    def unshared(self) -> MapProblem:
        """The same problem with q and k holding a shared prefix once a segment; itself where nothing is shared."""
        if self.device_token_index is None:
            return self
        return dataclasses.replace(
            self,
            q=self.q[self.device_token_index],
            k=self.k[self.device_token_index],
            shared_units=torch.zeros_like(self.shared_units),
            token_index=None,
            device_token_index=None,
        )

    def summed_over_segments(self, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of this problem's q and k from those of ``unshared``'s, in the same dtype.

        One segment of all examples after the other, none of which has a row twice: in one order on any device.
        """
        if self.token_index is None or not len(dq):
            return dq, dk
        sums = self.zero_gradients(self.dtype)
        segment = torch.repeat_interleave(self.unit_offsets[self.cu_units].diff()) % self.segments
        for x in range(self.segments):
            tokens = (segment == x).nonzero()[:, 0]
            rows, tokens = self.token_index[tokens].to(dq.device), tokens.to(dq.device)
            for total, parts in zip(sums, (dq, dk), strict=True):
                total.index_add_(0, rows, parts[tokens].to(total.dtype))
        return tuple(total.to(dq.dtype) for total in sums)

    @property
    def num_examples(self) -> int:
        """Examples of the batch."""
        return (self.cu_units.numel() - 1) // self.segments

    @property
    def total_units(self) -> int:
        """Units of the batch."""
        return self.unit_offsets.numel() - 1

    @functools.cached_property
    def segment_units(self) -> list[range]:
        """The units of every segment of the batch."""
        bounds = self.cu_units.tolist()
        return [range(first, last) for first, last in itertools.pairwise(bounds)]

    def example_segments(self, example: int) -> list[range]:
        """The units of every segment of one example."""
        return self.segment_units[example * self.segments : (example + 1) * self.segments]

    def shared_prefix(self, example: int) -> int:
        """Units that all segments of an example share, which q and k hold once."""
        return int(self.shared_units[example])

    def prefix_tokens(self, example: int) -> int:
        """The student's tokens of ``shared_prefix``."""
        first = self.example_segments(example)[0].start
        return int(self.unit_offsets[first + self.shared_prefix(example)] - self.unit_offsets[first])

    @functools.cached_property
    def example_rows(self) -> list[range]:
        """The rows of q and k that hold each example."""
        tokens = self.unit_offsets[self.cu_units[:: self.segments]].diff().tolist()
        stops = itertools.accumulate(
            count - (self.segments - 1) * self.prefix_tokens(example) for example, count in enumerate(tokens)
        )
        return [range(first, last) for first, last in itertools.pairwise((0, *stops))]

    @functools.cached_property
    def student(self) -> Attention:
        """The student's side."""
        return Attention(
            q=self.q,
            k=self.k,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            positions=None,
            slot_of_delta=None,
            c2p=None,
            p2c=None,
            unit_offsets=self.unit_offsets.tolist(),
            device_unit_offsets=self.device_unit_offsets,
            token_index=self.token_index,
        )

    @functools.cached_property
    def teacher(self) -> Attention:
        """The teacher's side; only for a teacher whose maps are not stored."""
        return Attention(
            q=self.teacher_q,
            k=self.teacher_k,
            softmax_scale=self.teacher_softmax_scale,
            causal=self.teacher_causal,
            positions=self.positions,
            slot_of_delta=self.slot_of_delta,
            c2p=self.c2p,
            p2c=self.p2c,
            unit_offsets=self.teacher_unit_offsets.tolist(),
            device_unit_offsets=self.teacher_device_unit_offsets,
            token_index=None,
        )


class LossOptions(NamedTuple):
    """The arguments of the loss beyond those of the distance, in the order of LOSS_SCHEMA."""

    row_weights: Tensor | None
    reduction: str
    intra_weight: float
    inter_weight: float
    needs_grad: bool


class LossOutput(NamedTuple):
    """What a loss op returns: scalars, and the gradients of ``loss`` (empty where none was asked for)."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    dq: Tensor
    dk: Tensor
