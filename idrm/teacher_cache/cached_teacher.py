"""A teacher that reads only the pairs of which the cache has no entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

from idrm.capture.teacher import Teacher
from idrm.teacher_cache.cache import ENTRY_DTYPE, TeacherCache
from idrm_kernels import PackedAttention, StoredMaps, attention_map_rows

if TYPE_CHECKING:
    from idrm.collator import InteractionInputs


class CachedTeacher:
    """Takes the place of a ``Teacher`` for batches whose collator looked their pairs up in the same cache.

    A missing pair is read by itself, without padding, and its values pass through the cache's dtype whether they were
    found or computed: so a pair has the same in every epoch and batch on one kind of device. The teacher is moved to
    the device of the batches when the first pair is missing, and ``ReleaseTeacher`` moves it away.

    Attributes:
        computed: pairs that the teacher read in this process.
        found: pairs whose attention came from the cache.
    """

    def __init__(self, teacher: Teacher, cache: TeacherCache):
        self.teacher = teacher
        self.cache = cache
        self.computed = 0
        self.found = 0
        self._not_stored: list[tuple[str, dict[str, Tensor]]] = []

    @torch.no_grad()
    def attention(self, inputs: InteractionInputs) -> list[StoredMaps] | list[PackedAttention]:
        """As ``Teacher.attention``: one entry a supervised layer. What was missing is computed, for ``store``."""
        cached = inputs.cached
        if cached is None:
            raise ValueError("inputs: expected a batch of a collator with this teacher's cache")
        self.found += cached.found
        self.computed += len(cached.missing)
        for pair in cached.missing:
            self.teacher.to(pair.inputs.teacher_input_ids.device)
            blocks = self.teacher.attention(pair.inputs)
            entry = self._maps(blocks, pair.inputs) if self.cache.form == "maps" else _queries_and_keys(blocks)
            for name, tensor in entry.items():
                cached.stored[name][pair.place] = tensor
            self._not_stored.append((pair.key, entry))
        if self.cache.form == "maps":
            return [StoredMaps(maps) for maps in cached.stored["maps"]]
        return self.teacher.restored(cached.stored["q"], cached.stored["k"], inputs)

    def store(self) -> None:
        """Writes the entries computed since the last call; waits for the device, so best once it has other work."""
        for key, entry in self._not_stored:
            self.cache.write(key, {name: tensor.cpu() for name, tensor in entry.items()})
        self._not_stored.clear()

    def _maps(self, blocks: list[PackedAttention], inputs: InteractionInputs) -> dict[str, Tensor]:
        """Of one pair, (layers, head groups, units, units)."""
        maps = [
            attention_map_rows(
                block,
                inputs.layout,
                range(inputs.layout.total_units),
                normalization=self.cache.normalization,
                num_head_groups=self.cache.num_head_groups,
                teacher_side=True,
            )
            for block in blocks
        ]
        return {"maps": torch.stack([torch.stack(rows, dim=1) for rows in maps]).to(ENTRY_DTYPE)}


class ReleaseTeacher(TrainerCallback):
    """Frees the accelerator's memory that a teacher takes after every epoch, until a pair is missing again."""

    def __init__(self, teacher: CachedTeacher):
        self.teacher = teacher

    def on_epoch_end(self, args, state, control, **kwargs):
        self.teacher.teacher.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # its memory belongs to another stream than the student's


def _queries_and_keys(blocks: list[PackedAttention]) -> dict[str, Tensor]:
    """q and k, each (layers, tokens, heads, head_dim)."""
    return {name: torch.stack([getattr(block, name) for block in blocks]).to(ENTRY_DTYPE) for name in ("q", "k")}
