"""A control: an encoder that attends to all tokens alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from idrm.capture.teacher import Teacher
from idrm_kernels import PackedAttention

if TYPE_CHECKING:
    from idrm.collator import InteractionInputs


class UniformTeacher:
    """Takes the place of a ``Teacher`` whose tokens, blocks and heads it has, and runs none of it."""

    def __init__(self, teacher: Teacher):
        self.tokenizer = teacher.tokenizer
        self._shape = (teacher.num_heads, teacher.head_dim)
        self._blocks = len(teacher.layers)

    def attention(self, inputs: InteractionInputs) -> list[PackedAttention]:
        """As ``Teacher.attention``, with queries and keys of zero."""
        zero = torch.zeros(len(inputs.teacher_index), *self._shape, device=inputs.teacher_index.device)
        return [PackedAttention(q=zero, k=zero)] * self._blocks
