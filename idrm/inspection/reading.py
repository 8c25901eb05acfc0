"""A teacher that reads preference pairs as in training, with every block that could be supervised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from idrm.alignment import PairEncoder
from idrm.capture import Teacher
from idrm.capture.layers import resolve_layers
from idrm.capture.teacher import DEFAULT_TEACHER_MAX_LENGTH, is_nli_classifier, load_teacher_config
from idrm.collator import PairCollator
from idrm.command_line import length_within
from idrm.errors import InputError
from idrm.inspection.measures import PairUnits
from idrm_kernels import MapLayout, PackedAttention, attention_map_rows

# The teacher's tokenizer stands in for the student's too, and that student is to lose nothing.
_NO_STUDENT_LIMIT = 1 << 30


@dataclass(frozen=True)
class ReadPair:
    """One pair as the teacher read it: the attention of its blocks over content tokens, and what they are.

    Attributes:
        attention: for each of the reader's layers.
        layout: of this pair alone; a unit is a token of the teacher, or a few that share a character.
        units: where segments and responses lie.
        tokens: for each unit its text as the tokenizer has it.
        teacher_name: whose it is, for errors.
    """

    attention: list[PackedAttention]
    layout: MapLayout
    units: PairUnits
    tokens: list[str]
    teacher_name: str

    def has_units_of(self, other: ReadPair) -> bool:
        """Whether maps of both can be compared entry by entry."""
        return self.tokens == other.tokens and self.units.segments == other.units.segments

    def map(self, block: int, normalization: Literal["block", "joint"]) -> Tensor:
        """The head-averaged map (units, units) of one block, counted in ``attention``."""
        rows = attention_map_rows(
            self.attention[block],
            self.layout,
            range(self.layout.total_units),
            normalization=normalization,
            teacher_side=True,
        )
        values = torch.cat(rows)
        if not values.isfinite().all():
            raise InputError(f"teacher {self.teacher_name!r}: its maps hold values that are no numbers")
        return values


class TeacherReader:
    """Reads pairs one at a time: with the queries and keys of all blocks in memory, more at once would gain little.

    Attributes:
        name: the name or path that it was loaded from.
        layers: the blocks that are looked at, counted from 0, ascending.
        num_layers: the depth of the model.
        is_nli_classifier: whether its checkpoint has a head for NLI's labels.
        max_length: of a joint input, in tokens.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        layers: Iterable[int] | None,
        max_length: int | None,
        rows: Literal["all", "response"],
        dtype: torch.dtype | None,
        device: torch.device | str,
    ):
        """Raises InputError for what ``Teacher.load`` refuses, and a length beyond what the teacher reads."""
        self.name = name_or_path
        config, family = load_teacher_config(name_or_path)
        self.num_layers = config.num_hidden_layers
        self.is_nli_classifier = is_nli_classifier(config)
        asked = (
            family.supervisable_layers(config) if layers is None else resolve_layers(layers, self.num_layers, "teacher")
        )
        self._teacher = Teacher.load(name_or_path, layers=sorted(set(asked)), dtype=dtype).to(device)
        self.layers = self._teacher.layers
        limit = self._teacher.max_length
        self.max_length = length_within("teacher_max_length", max_length, limit, limit or DEFAULT_TEACHER_MAX_LENGTH)
        tokenizer = self._teacher.tokenizer
        self._encode = PairEncoder(
            tokenizer, tokenizer, max_length=_NO_STUDENT_LIMIT, teacher_max_length=self.max_length
        )
        self._collate = PairCollator(tokenizer, tokenizer)
        self._rows = rows
        self._device = device

    def encode(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What ``PairEncoder`` makes of a converted pair."""
        return self._encode(record)

    def read(self, encoded: Mapping[str, Any]) -> ReadPair:
        """The teacher's attention over one encoded pair that has units."""
        inputs = self._collate([encoded])["interaction"].to(self._device)
        pieces = self._teacher.tokenizer.convert_ids_to_tokens(inputs.teacher_input_ids.flatten()[inputs.teacher_index])
        offsets = inputs.layout.teacher_unit_offsets
        return ReadPair(
            attention=self._teacher.attention(inputs),
            layout=inputs.layout,
            units=PairUnits.of(encoded, offsets.diff(), self._rows),
            tokens=["".join(pieces[start:stop]) for start, stop in itertools.pairwise(offsets.tolist())],
            teacher_name=self.name,
        )
