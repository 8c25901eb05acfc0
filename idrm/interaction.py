"""The interaction loss of a batch: the student's captured q and k against the teacher's, over pairs of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from idrm.arguments import InteractionArguments
from idrm.capture.student import CapturedBlock
from idrm.capture.teacher import Teacher
from idrm.capture.uniform import UniformTeacher
from idrm.collator import InteractionInputs
from idrm.errors import InputError
from idrm.side_stream import SideStream
from idrm.teacher_cache import CachedTeacher
from idrm_kernels import MapLayout, MapLoss, PackedAttention, StoredMaps, attention_map_distance, attention_map_loss
from idrm_kernels.reduction import example_losses

TeacherAttention: TypeAlias = PackedAttention | StoredMaps


class InteractionLoss:
    """Compares supervised student blocks with the teacher's, as the arguments say (DESIGN section 2).

    Args:
        teacher: frozen, perhaps behind a cache, or a control; its blocks are paired in order with ``student_layers``.
        student_layers: the supervised blocks of the student, non-negative.
        arguments: weights, reduction, metric, normalisation, head groups and kernel.
    """

    def __init__(
        self,
        teacher: Teacher | CachedTeacher | UniformTeacher,
        student_layers: Sequence[int],
        arguments: InteractionArguments,
    ):
        self.teacher = teacher
        self.student_layers = tuple(student_layers)
        self.weights = {"intra_weight": arguments.intra_weight, "inter_weight": arguments.inter_weight}
        self.reduction = arguments.reduction
        self.distance = _distance_arguments(arguments)
        self._side_stream = SideStream()

    def batch_loss(
        self, student: Sequence[PackedAttention], teacher: Sequence[TeacherAttention], inputs: InteractionInputs
    ) -> MapLoss:
        """Mean over the block pairs: float32 scalars loss (differentiable), intra and inter (detached, unweighted)."""
        losses = [
            attention_map_loss(
                student_block,
                teacher_block,
                inputs.layout,
                reduction=self.reduction,
                row_weights=inputs.row_weights,
                **self.weights,
                **self.distance,
            )
            for student_block, teacher_block in zip(student, teacher, strict=True)
        ]
        return MapLoss(*(torch.stack(values).mean() for values in zip(*losses, strict=True)))

    @torch.no_grad()
    def pair_losses(
        self, student: Sequence[PackedAttention], teacher: Sequence[TeacherAttention], inputs: InteractionInputs
    ) -> MapLoss:
        """The same for each pair of the batch: float32 tensors (B,) whose means are those of ``batch_loss``."""
        intra, inter = [], []
        for student_block, teacher_block in zip(student, teacher, strict=True):
            distances = attention_map_distance(student_block, teacher_block, inputs.layout, **self.distance)
            block_intra, block_inter = example_losses(
                distances, inputs.layout, reduction=self.reduction, row_weights=inputs.row_weights
            )
            intra.append(block_intra)
            inter.append(block_inter)
        intra, inter = torch.stack(intra).mean(0).float(), torch.stack(inter).mean(0).float()
        return MapLoss(self.weights["intra_weight"] * intra + self.weights["inter_weight"] * inter, intra, inter)

    def student_attention(
        self, blocks: Mapping[int, CapturedBlock], inputs: InteractionInputs
    ) -> list[PackedAttention]:
        """The content tokens of the captured blocks, packed, in the order of the supervised layers."""
        return [
            PackedAttention(
                q=_gather(blocks[layer].query, inputs.student_index),
                k=_gather(blocks[layer].key, inputs.student_index),
                softmax_scale=blocks[layer].softmax_scale,
            )
            for layer in self.student_layers
        ]

    def begin_teacher(self, inputs: InteractionInputs) -> Callable[[], list[TeacherAttention]]:
        """Starts the teacher on these pairs, on a stream of its own; the function returned gives its blocks."""
        device = inputs.teacher_input_ids.device
        finish = self._side_stream.start(device, lambda: self.teacher.attention(inputs))

        def blocks() -> list[TeacherAttention]:
            attention = finish()
            if isinstance(self.teacher, CachedTeacher):
                self.teacher.store()
            return attention

        return blocks

    def teacher_attention(self, inputs: InteractionInputs) -> list[TeacherAttention]:
        """The teacher's blocks for the same pairs."""
        return self.begin_teacher(inputs)()

    def uniform_attention(self, student: Sequence[PackedAttention]) -> list[PackedAttention]:
        """A student that attends to all tokens alike, of the same size: what interaction_ratio measures against."""
        zeros = [
            block.q.new_zeros(len(block.q), self.distance["num_head_groups"], block.q.shape[-1]) for block in student
        ]
        return [PackedAttention(q=zero, k=zero) for zero in zeros]


def require_runnable_kernel(arguments: InteractionArguments, device: torch.device) -> None:
    """Raises InputError if the kernel that was asked for cannot run on this device."""
    token = torch.zeros(2, arguments.num_head_groups, 16, device=device)
    attention = PackedAttention(q=token, k=token)
    layout = MapLayout.build([0, 1, 2], device=device)
    try:
        attention_map_distance(attention, attention, layout, **_distance_arguments(arguments))
    except ValueError as error:
        raise InputError(f"--kernel_impl {arguments.kernel_impl}: {error}") from error


def _distance_arguments(arguments: InteractionArguments) -> dict[str, Any]:
    return {
        "metric": arguments.metric,
        "normalization": arguments.normalization,
        "num_head_groups": arguments.num_head_groups,
        "impl": arguments.kernel_impl,
    }


def _gather(heads: Tensor, index: Tensor) -> Tensor:
    """(rows, num_heads, N, head_dim) and flat token indices to (total_tokens, num_heads, head_dim)."""
    return heads.transpose(1, 2).flatten(0, 1).index_select(0, index)
