"""A teacher that reads only the pairs of which the cache has no entry."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

from idrm.capture.teacher import Teacher
from idrm.teacher_cache.cache import DTYPE, CachedAttention, TeacherCache
from idrm_kernels import PackedAttention, StoredMaps, attention_map_rows

if TYPE_CHECKING:
    from idrm.collator import InteractionInputs


class CachedTeacher:
    """Takes the place of a ``Teacher`` for batches whose collator looked their pairs up in the same cache.

    Values pass through the cache's dtype whether they were found or computed, so that a pair has the same in every
    epoch. The teacher is moved to the device of the batches when the first pair is missing, and ``ReleaseTeacher``
    moves it away.

    Attributes:
        computed: pairs that the teacher read in this process.
        found: pairs whose attention came from the cache.
    """

    def __init__(self, teacher: Teacher, cache: TeacherCache):
        self.teacher = teacher
        self.cache = cache
        self.computed = 0
        self.found = 0

    @torch.no_grad()
    def attention(self, inputs: InteractionInputs) -> list[StoredMaps] | list[PackedAttention]:
        """As ``Teacher.attention``: one entry a supervised layer; what was missing is computed, and stored."""
        cached = inputs.cached
        if cached is None:
            raise ValueError("inputs: expected a batch of a collator with this teacher's cache")
        self.found += cached.found
        if cached.missing_inputs is not None:
            self.computed += len(cached.missing)
            self.teacher.to(cached.missing_inputs.teacher_input_ids.device)
            blocks = self.teacher.attention(cached.missing_inputs)
            entries = self._maps(blocks, cached) if self.cache.form == "maps" else _queries_and_keys(blocks, cached)
            for pair, entry in zip(cached.missing, entries, strict=True):
                for name, tensor in entry.items():
                    cached.stored[name][pair.place] = tensor
                self.cache.write(pair.key, {name: tensor.cpu() for name, tensor in entry.items()})
        if self.cache.form == "maps":
            return [StoredMaps(maps) for maps in cached.stored["maps"]]
        return self.teacher.restored(cached.stored["q"], cached.stored["k"], inputs)

    def _maps(self, blocks: list[PackedAttention], cached: CachedAttention) -> list[dict[str, Tensor]]:
        """For every missing pair its maps (layers, head groups, units, units)."""
        layout = cached.missing_inputs.layout
        entries: list[list[Tensor]] = [[] for _ in cached.missing]
        for block in blocks:
            rows = iter(
                attention_map_rows(
                    block,
                    layout,
                    range(layout.total_units),
                    normalization=self.cache.normalization,
                    num_head_groups=self.cache.num_head_groups,
                    teacher_side=True,
                )
            )
            for pair, maps in zip(cached.missing, entries, strict=True):
                maps.append(torch.stack(list(itertools.islice(rows, pair.units)), dim=1).to(DTYPE))
        return [{"maps": torch.stack(maps)} for maps in entries]


class ReleaseTeacher(TrainerCallback):
    """Frees the accelerator's memory that a teacher takes after every epoch, until a pair is missing again."""

    def __init__(self, teacher: CachedTeacher):
        self.teacher = teacher

    def on_epoch_end(self, args, state, control, **kwargs):
        self.teacher.teacher.to("cpu")


def _queries_and_keys(blocks: list[PackedAttention], cached: CachedAttention) -> list[dict[str, Tensor]]:
    """For every missing pair its q and k, each (layers, tokens, heads, head_dim)."""
    tokens = [pair.tokens for pair in cached.missing]
    q, k = (torch.stack([getattr(block, name) for block in blocks]).to(DTYPE).split(tokens, dim=1) for name in "qk")
    return [{"q": own_q, "k": own_k} for own_q, own_k in zip(q, k, strict=True)]
