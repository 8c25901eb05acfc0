"""Encoded pairs to one batch, padded or in one row, with the indices and the MapLayout of the interaction loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from idrm.objectives.pair_order import ORDER_COLUMN
from idrm.shared_prompts.packing import PackedPair, pack_pairs
from idrm.teacher_cache.cache import CachedAttention, TeacherCache
from idrm_kernels import MapLayout

SEGMENTS = 2  # chosen and rejected


@dataclasses.dataclass(frozen=True)
class InteractionInputs:
    """What the interaction loss of B pairs needs beside the student's q and k.

    Packed order is pair after pair: chosen_0, rejected_0, chosen_1, ...

    Attributes:
        teacher_input_ids, teacher_attention_mask, teacher_token_type_ids: (R, M) int64, chosen and rejected jointly; a
            row a pair, or where a pair is read in windows a row for each.
        student_index: (total_tokens,) int64, row * N + position in the student's (2B, N) batch, or the place in its one
            row. The units that both segments of a pair begin with are named once where the row holds their tokens once:
            then the layout has them as a shared prefix.
        teacher_index: (teacher_total_tokens,) int64, row * M + position in the teacher's batch.
        teacher_positions: (teacher_total_tokens,) int32, positions in the joint input, specials counted, padding not;
            of a pair read in windows, in the one input that would hold it whole.
        layout: segments, units and sizes of the batch.
        row_weights: (total_units,) float32, or None where all rows weigh 1.
        teacher_span: the teacher's positions lie below it.
        cached: with a teacher cache, what it holds of these pairs; None without one.
    """

    teacher_input_ids: Tensor
    teacher_attention_mask: Tensor
    teacher_token_type_ids: Tensor
    student_index: Tensor
    teacher_index: Tensor
    teacher_positions: Tensor
    layout: MapLayout
    row_weights: Tensor | None
    teacher_span: int
    cached: CachedAttention | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> InteractionInputs:
        """The same inputs on another device."""
        return self._changed(
            lambda value: value.to(device, non_blocking=non_blocking), (Tensor, MapLayout, CachedAttention)
        )

    def pin_memory(self) -> InteractionInputs:
        """The same inputs in page-locked memory; the layout, a few tensors of tokens, stays where it is."""
        return self._changed(lambda value: value.pin_memory(), (Tensor, CachedAttention))

    def _changed(self, change: Callable[[Any], Any], kinds: tuple[type, ...]) -> InteractionInputs:
        """The same with the fields of these kinds changed."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return InteractionInputs(
            **{name: change(value) if isinstance(value, kinds) else value for name, value in values.items()}
        )


class PairCollator:
    """Collates what ``PairEncoder`` made of B pairs.

    Sequences are padded on the right whatever the tokenizer prefers: then each segment's positions start at 0, on which
    the maps between segments depend (q and k are compared after RoPE), and so do models with absolute positions.

    Args:
        tokenizer: the student's, with a pad token.
        teacher_tokenizer: None for Bradley-Terry alone.
        interaction_rows: "all", or "response" to weigh the prompt's rows 0.
        cache: looked up for every pair, for a ``CachedTeacher``.
        share_prompt: whether pairs stand in one row without padding, each common beginning in it once
            (`idrm.shared_prompts`), for a model that can read them so.

    Returns:
        ``input_ids`` and ``attention_mask`` (2B, N) int64, rows 0..B-1 chosen and B..2B-1 rejected, or
        ``packed_pairs``, a PackedPairs, with its ``input_ids``; ``lengths`` (2, B) int64, tokens of the sequences;
        ``margin`` (B,) float32 where a pair has one (0 for the others); ``chosen_is_first`` (B,) bool where the pairs'
        order was drawn; ``interaction``, an InteractionInputs, with a teacher.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        interaction_rows: Literal["all", "response"] = "all",
        cache: TeacherCache | None = None,
        share_prompt: bool = False,
    ):
        self.tokenizer = tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.interaction_rows = interaction_rows
        self.cache = cache
        self.share_prompt = share_prompt

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sides = [[pair[column] for pair in pairs] for column in ("chosen_input_ids", "rejected_input_ids")]
        batch: dict[str, Any] = {"lengths": torch.tensor([[len(sequence) for sequence in side] for side in sides])}
        places: Sequence[PackedPair | PaddedPair]
        if self.share_prompt:
            packed = pack_pairs(*sides)
            batch |= {"input_ids": packed.input_ids, "packed_pairs": packed}
            places = packed.pairs
        else:
            batch["input_ids"], batch["attention_mask"] = _pad([*sides[0], *sides[1]], self.tokenizer.pad_token_id)
            places = padded_pairs(*batch["input_ids"].shape)
        margins = [pair.get("margin") for pair in pairs]
        if any(margin is not None for margin in margins):
            batch["margin"] = torch.tensor([margin or 0.0 for margin in margins], dtype=torch.float32)
        if ORDER_COLUMN in pairs[0]:
            batch[ORDER_COLUMN] = torch.tensor([pair[ORDER_COLUMN] for pair in pairs])
        if self.teacher_tokenizer is not None:
            inputs = self._interaction(pairs, places)
            if self.cache is not None:
                # For the teacher, to whom it makes no difference where the student's tokens stand.
                alone = padded_pairs(SEGMENTS, int(batch["lengths"].max()))
                cached = self.cache.batch(pairs, inputs.layout.max_units, lambda pair: self._interaction([pair], alone))
                inputs = dataclasses.replace(inputs, cached=cached)
            batch["interaction"] = inputs
        return batch

    def _interaction(
        self, pairs: Sequence[Mapping[str, Any]], places: Sequence[PackedPair | PaddedPair]
    ) -> InteractionInputs:
        """Packs the tokens that take part; ``places`` say where the student has those of each pair."""
        teacher = self.teacher_tokenizer
        teacher_ids, teacher_mask = _pad(_windows(pairs, "teacher_input_ids"), teacher.pad_token_id)
        teacher_types, _ = _pad(_windows(pairs, "teacher_token_type_ids"), teacher.pad_token_type_id)
        teacher_width = teacher_ids.shape[1]
        first_row = 0
        student_index, teacher_index, teacher_positions = [], [], []
        student_units, teacher_units, row_weights = [], [], []
        seqlens, teacher_seqlens, unit_counts, shared_prefix_lens = [], [], [], []
        total_units = 0
        for example, pair in enumerate(pairs):
            lengths = pair["teacher_window_lengths"]
            # Where in the padded rows each token of the pair's windows stands.
            padded = [
                (first_row + row) * teacher_width + column for row, n in enumerate(lengths) for column in range(n)
            ]
            first_row += len(lengths)
            shared = shared_prefix_len(pair["student_positions"], pair["student_units"], places[example].shared)
            shared_prefix_lens.append(shared)
            for segment in range(SEGMENTS):
                positions, joint_positions = pair["student_positions"][segment], pair["teacher_positions"][segment]
                named = positions if segment == 0 else positions[shared:]
                student_index += [places[example].place(segment, position) for position in named]
                teacher_index += [padded[place] for place in pair["teacher_places"][segment]]
                teacher_positions += joint_positions
                student_units += [total_units + unit for unit in pair["student_units"][segment]]
                teacher_units += [total_units + unit for unit in pair["teacher_units"][segment]]
                units, response_units = pair["num_units"][segment], pair["response_units"][segment]
                row_weights += [0.0] * (units - response_units) + [1.0] * response_units
                seqlens.append(len(positions))
                teacher_seqlens.append(len(joint_positions))
                unit_counts.append(units)
                total_units += units
        layout = MapLayout.build(
            list(accumulate(seqlens, initial=0)),
            segments=SEGMENTS,
            teacher_cu_seqlens=list(accumulate(teacher_seqlens, initial=0)),
            cu_units=list(accumulate(unit_counts, initial=0)),
            unit_of_token=student_units,
            teacher_unit_of_token=teacher_units,
            shared_prefix_lens=shared_prefix_lens,
        )
        return InteractionInputs(
            teacher_input_ids=teacher_ids,
            teacher_attention_mask=teacher_mask,
            teacher_token_type_ids=teacher_types,
            student_index=torch.tensor(student_index, dtype=torch.int64),
            teacher_index=torch.tensor(teacher_index, dtype=torch.int64),
            teacher_positions=torch.tensor(teacher_positions, dtype=torch.int32),
            layout=layout,
            row_weights=torch.tensor(row_weights) if self.interaction_rows == "response" else None,
            teacher_span=1 + max(teacher_positions, default=0),
        )


class PaddedPair(NamedTuple):
    """Where one pair stands in two rows of a padded batch; as ``PackedPair`` does in its one.

    Attributes:
        rows: the first token of the chosen and of the rejected row, row after row.
    """

    rows: tuple[int, int]
    shared: int = 0

    def place(self, segment: int, position: int) -> int:
        """Where a token of a sequence, 0 chosen and 1 rejected, stands in the flat batch."""
        return self.rows[segment] + position


def padded_pairs(rows: int, width: int) -> list[PaddedPair]:
    """The pairs of a batch of so many rows of this width, those of chosen first."""
    return [PaddedPair((row * width, (row + rows // 2) * width)) for row in range(rows // 2)]


def shared_prefix_len(positions: Sequence[Sequence[int]], units: Sequence[Sequence[int]], shared: int) -> int:
    """Tokens that take part and are the same whole units at the beginning of both segments.

    Args:
        positions, units: per segment the tokens that take part and their units, from 0 in each segment.
        shared: the first tokens of both sequences that the student's row holds once.
    """
    chosen, rejected = (list(zip(*own, strict=True)) for own in zip(positions, units, strict=True))
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count] and chosen[count][0] < shared:
        count += 1
    # Back to where a unit ends in both.
    while count and any(count < len(own) and own[count] == own[count - 1] for own in units):
        count -= 1
    return count


def _windows(pairs: Sequence[Mapping[str, Any]], column: str) -> list[list[int]]:
    """The teacher's inputs of all pairs, window after window."""
    windows = []
    for pair in pairs:
        ends = list(accumulate(pair["teacher_window_lengths"], initial=0))
        windows += [pair[column][start:end] for start, end in pairwise(ends)]
    return windows


def _pad(sequences: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64 ids and their mask."""
    longest = max(map(len, sequences))
    ids = [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)
