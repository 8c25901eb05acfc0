"""Where in the text a reward model looks, and what it needs of it: Figure 1 of arXiv 2508.02618.

The content tokens of a sequence (no special, template or padding tokens) are divided from front to end into stages of
equal numbers of tokens: with ten of them, deciles. Of each stage the analysis has the attention that the pooled token
pays to it, and of each number of stages whether pairs are still decided rightly when so many are masked from the front.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from idrm.alignment.rendering import canonical_text
from idrm.analysis.content import ContentReader, ContentSequence
from idrm.analysis.pooled_attention import PooledAttention
from idrm.errors import InputError
from idrm.evaluation.batching import batches_by_length
from idrm.evaluation.reward_model import RewardModel, padded_right, padding_id, pads_with

STAGES = 10
DEFAULT_PAIRS_IN_A_BATCH = 8


@dataclass(frozen=True)
class StageAnalysis:
    """What became of the pairs of one set; the second axis of two is chosen, rejected.

    Attributes:
        attention: (pairs, 2, stages) float64: the pooled token's attention to the content tokens of each stage, the
            mean over heads. What is left to 1 goes to special and template tokens.
        rewards: (stages, pairs, 2) float64: the rewards with so many stages masked from the front, from none on.
        prompts: (pairs,) the prompt's text: pairs of one prompt belong together.
        layer: the block, counted from 0.
        dropped: how many pairs were left out, by reason.
    """

    attention: np.ndarray
    rewards: np.ndarray
    prompts: list[str]
    layer: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def won(self) -> np.ndarray:
        """(stages, pairs) bool: chosen has the strictly greater reward."""
        return self.rewards[..., 0] > self.rewards[..., 1]

    @property
    def tied(self) -> np.ndarray:
        """(stages, pairs) bool: both rewards are equal, which counts as wrong."""
        return self.rewards[..., 0] == self.rewards[..., 1]

    @property
    def shares(self) -> np.ndarray:
        """(pairs, 2, stages) float64: the attention to each stage over that to all content; 0 where that is 0."""
        whole = self.attention.sum(axis=-1, keepdims=True)
        return np.divide(self.attention, whole, out=np.zeros_like(self.attention), where=whole > 0)


def stage_bounds(num_tokens: int, stages: int = STAGES) -> list[int]:
    """The first token of every stage and the end of the last; fewer tokens than stages leave early stages empty.

    No number of stages short of all then masks the last token.
    """
    return [stage * num_tokens // stages for stage in range(stages + 1)]


def attention_by_stage(
    reward_model: RewardModel,
    pairs: Sequence[Mapping[str, Any]],
    *,
    layer: int = -1,
    stages: int = STAGES,
    batch_size: int = DEFAULT_PAIRS_IN_A_BATCH,
) -> StageAnalysis:
    """Reads every pair once for each number of masked stages, in batches of similar lengths.

    Masked tokens are hidden by the attention mask and keep their positions; special and template tokens are never
    masked.

    Args:
        reward_model: as ``load_reward_model`` gives it.
        pairs: as ``load_preferences`` gives them (a Dataset or a list): chosen and rejected messages, conversational.
        layer: the block whose attention is looked at, negative from the end.
        stages: how many each sequence is divided into.
        batch_size: pairs in a batch; the results depend on it by rounding only. Both sequences of a pair are in one
            batch, for what is masked may be all that tells them apart, and rounding must not decide then.

    Raises:
        InputError: what ``PooledAttention`` refuses, fewer than one stage or pair in a batch, rewards or attention
            that are no numbers, no pair whose contents can be found in what the model reads.
    """
    for name, value in (("stages", stages), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    model = PooledAttention(reward_model.model, layer)
    sequences, prompts, dropped = _read(reward_model, pairs)
    bounds = [stage_bounds(len(sequence.positions), stages) for sequence in sequences]
    attention = np.zeros((len(sequences), stages))
    rewards = np.zeros((stages, len(sequences)))
    lengths = [len(sequence.ids) for sequence in sequences]
    batches = batches_by_length([max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)], batch_size)
    for pairs_of_batch in track(batches, "Reading pairs", console=Console(stderr=True), transient=True):
        batch = [2 * pair + side for pair in pairs_of_batch for side in range(2)]
        of_batch = [sequences[index].ids for index in batch]
        pad = padding_id(reward_model.model, of_batch)
        input_ids, attention_mask = padded_right(of_batch, pad, reward_model.model.device)
        for masked in range(stages):
            for row, index in enumerate(batch):
                attention_mask[row, sequences[index].positions[: bounds[index][masked]]] = 0
            with pads_with(reward_model.model.config, pad):
                scores, paid = model(input_ids, attention_mask)
            rewards[masked, batch] = scores.double().cpu().numpy()
            if masked == 0:
                for row, index in zip(paid.double().cpu().numpy(), batch, strict=True):
                    # Stages may be empty, for which add.reduceat would give the next token.
                    running = np.concatenate([[0.0], np.cumsum(row[sequences[index].positions])])
                    attention[index] = np.diff(running[bounds[index]])
    if not (np.isfinite(rewards).all() and np.isfinite(attention).all()):
        raise InputError(f"{reward_model.model.name_or_path}: gives rewards or attention that are no numbers")
    return StageAnalysis(
        attention=attention.reshape(-1, 2, stages),
        rewards=rewards.reshape(stages, -1, 2),
        prompts=prompts,
        layer=model.layer,
        dropped=dropped,
    )


def _read(
    reward_model: RewardModel, pairs: Sequence[Mapping[str, Any]]
) -> tuple[list[ContentSequence], list[str], dict[str, int]]:
    """Chosen and rejected of every usable pair in turn, their prompts, and how many pairs are not usable, by reason."""
    read = ContentReader(reward_model)
    sequences: list[ContentSequence] = []
    prompts: list[str] = []
    dropped: Counter[str] = Counter()
    reason = ""
    for pair in pairs:
        try:
            both = read(pair)
        except InputError as error:
            dropped["contents_not_found"] += 1
            reason = reason or str(error)
            continue
        if both[0].ids == both[1].ids:
            dropped["identical_after_cutting"] += 1
            continue
        sequences += both
        prompts.append(canonical_text(pair["chosen"][:-1]).text)
    if not sequences:
        counts = ", ".join(f"{count:,} {name}" for name, count in dropped.items()) or "none given"
        raise InputError(f"no pair can be analysed ({counts})" + (f"; {reason}" if reason else ""))
    return sequences, prompts, dict(sorted(dropped.items()))
