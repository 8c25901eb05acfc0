"""The content tokens of what a reward model reads of a pair: no special, template or padding tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from idrm.alignment import PairEncoder
from idrm.alignment.encoding import MIN_LENGTH
from idrm.alignment.rendering import TemplateRefusal
from idrm.errors import InputError
from idrm.evaluation.reward_model import RewardModel


@dataclass(frozen=True)
class ContentSequence:
    """One sequence as the model reads it.

    Attributes:
        ids: token ids, special and template tokens included.
        positions: of the content tokens among them, ascending.
        texts: what each of these covers of the contents, without white space; tokens that are bytes of one character
            all have that character.
        response_start: how many of them, the first ones, belong to the prompt.
    """

    ids: list[int]
    positions: list[int]
    texts: list[str]
    response_start: int


class ContentReader:
    """Reads pairs as training feeds them to the model, and finds the contents in them."""

    def __init__(self, reward_model: RewardModel):
        self._name = reward_model.model.name_or_path
        self._encoder = PairEncoder(
            reward_model.tokenizer, None, max_length=reward_model.max_length, teacher_max_length=MIN_LENGTH
        )

    def __call__(self, pair: Mapping[str, Any]) -> list[ContentSequence]:
        """[chosen, rejected] of a pair as ``load_preferences`` gives it.

        Raises:
            InputError: the chat template refuses the messages, or alters their contents, which are not found then; or a
                cut to the model's length leaves nothing of them.
        """
        try:
            both = self._encoder.student_contents(pair)
        except TemplateRefusal as refusal:
            raise InputError(f"{self._name}: its chat template refuses the messages: {refusal}") from refusal
        sequences = []
        for side, read in zip(("chosen", "rejected"), both, strict=True):
            if not read.positions:
                raise InputError(f"{self._name}: none of the contents of {side} is found in what the model reads")
            contents = "".join("".join(message["content"].split()) for message in pair[side])
            texts = [contents[start:end] for start, end in read.spans]
            sequences.append(ContentSequence(read.ids, read.positions, texts, read.prompt_tokens))
        return sequences
