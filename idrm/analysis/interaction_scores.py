"""How the tokens of two sequences would interact by a reward model's queries and keys: Figure 2 of arXiv 2508.02618."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from idrm.analysis.content import ContentReader, ContentSequence
from idrm.capture import QueryKeyCapture
from idrm.errors import InputError
from idrm.evaluation.reward_model import RewardModel, padded_right, padding_id, pads_with

# Our own: the text of the example in the paper's figure was not to be had.
EXAMPLE = {
    "prompt": "Can I give my dog grapes as a treat?",
    "chosen": "No, grapes can damage a dog's kidneys. Give it a slice of apple instead.",
    "rejected": "Yes, grapes are a healthy treat. Give your dog as many as it likes.",
}


@dataclass(frozen=True)
class TokensOfSequence:
    """The content tokens on one side of the scores.

    Attributes:
        name: "chosen" or "rejected".
        texts: of each token what it covers of the contents, without white space.
        response_start: how many of them, the first ones, belong to the prompt.
        reward: of the whole sequence.
    """

    name: str
    texts: list[str]
    response_start: int
    reward: float


@dataclass(frozen=True)
class InteractionScores:
    """The scores between the content tokens of chosen and rejected, which no forward pass computes.

    Attributes:
        scores: (rows, columns) float64 in [-1, 1]: the mean over heads of query.key before the softmax, minus its mean
            over the matrix, over the largest magnitude; all 0 where there is no difference.
        rows: the tokens whose queries they are of.
        columns: the tokens whose keys they are of.
        layer: the block, counted from 0.
    """

    scores: np.ndarray
    rows: TokensOfSequence
    columns: TokensOfSequence
    layer: int


@torch.no_grad()
def interaction_scores(
    reward_model: RewardModel,
    pair: Mapping[str, Any],
    *,
    layer: int = -1,
    queries: Literal["chosen", "rejected"] = "chosen",
    part: Literal["all", "response"] = "all",
) -> InteractionScores:
    """Scores one pair, each sequence read by itself, at positions of its own from 0 on, as in training.

    Args:
        reward_model: as ``load_reward_model`` gives it.
        pair: as ``idrm.preference.formats.convert_record`` gives it: chosen and rejected messages, conversational.
        layer: the block, negative from the end.
        queries: the sequence whose queries meet the other's keys.
        part: the tokens that are looked at: "all", or those of the "response". Mean and magnitude are those of what is
            looked at; a prompt that both share stands out in it, for its tokens meet their own copies.

    Raises:
        InputError: a layer beyond the depth, a model whose queries and keys cannot be captured, a pair whose contents
            cannot be found in what the model reads, or scores that are no numbers.
    """
    capture = QueryKeyCapture(reward_model.model, [layer])
    (layer,) = capture.layers
    names = ("chosen", "rejected")
    sequences = ContentReader(reward_model)(pair)
    for name, sequence in zip(names, sequences, strict=True):
        if not _looked_at(sequence, part):
            raise InputError(f"{name}: nothing is left of its response in what the model reads of it")
    rewards, blocks = [], []
    for sequence in sequences:
        pad = padding_id(reward_model.model, [sequence.ids])
        input_ids, attention_mask = padded_right([sequence.ids], pad, reward_model.model.device)
        with pads_with(reward_model.model.config, pad), capture.recording():
            logits = reward_model.model(input_ids=input_ids, attention_mask=attention_mask).logits
        rewards.append(logits.item())
        blocks.append(capture.take()[layer])
    row, column = (0, 1) if queries == "chosen" else (1, 0)
    query = blocks[row].query[0, :, _looked_at(sequences[row], part)].double()
    key = blocks[column].key[0, :, _looked_at(sequences[column], part)].double()
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = (query @ key.mT).mean(dim=0).cpu().numpy()
    if not np.isfinite(scores).all():
        raise InputError(f"{reward_model.model.name_or_path}: layer {layer} gives scores that are no numbers")
    sides = [
        TokensOfSequence(name, *_labels(sequence, part), reward)
        for name, sequence, reward in zip(names, sequences, rewards, strict=True)
    ]
    return InteractionScores(centred(scores), sides[row], sides[column], layer)


def centred(scores: np.ndarray) -> np.ndarray:
    """Minus the mean, over the largest magnitude: in [-1, 1], and 0 throughout where all are equal."""
    around_mean = scores - scores.mean()
    largest = np.abs(around_mean).max()
    # What is left of equal numbers is their rounding.
    if largest <= np.finfo(scores.dtype).eps * scores.size * np.abs(scores).max():
        return np.zeros_like(scores)
    return around_mean / largest


def _looked_at(sequence: ContentSequence, part: str) -> Sequence[int]:
    return sequence.positions[sequence.response_start if part == "response" else 0 :]


def _labels(sequence: ContentSequence, part: str) -> tuple[list[str], int]:
    start = sequence.response_start if part == "response" else 0
    return sequence.texts[start:], sequence.response_start - start
