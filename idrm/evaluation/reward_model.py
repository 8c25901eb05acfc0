"""Reward models, ours and others': any sequence classifier of one label, scored right whatever its pad token is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from idrm.alignment.rendering import Message
from idrm.errors import InputError
from idrm.evaluation.batching import DEFAULT_BATCH_SIZE, score_in_batches
from idrm.evaluation.neighbours import Neighbours, neighbours
from idrm.evaluation.reading import MessageReader, load_config, load_tokenizer, load_whole, readable_length
from idrm.shared_prompts import pack_pairs, packed_attention_refusal, read_packed_pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model, in evaluation mode.

    Attributes:
        model: the classifier, of one label.
        tokenizer: its fast tokenizer.
        max_length: most tokens of a sequence.
        reader: from messages to ids.
        reads_packed_pairs: whether the model can be called with `packed_pairs` (`idrm.shared_prompts`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    reader: MessageReader
    reads_packed_pairs: bool = False

    def encode(self, messages: Sequence[Message], conversational: bool) -> list[int]:
        """The ids of messages, cut to `max_length`; TemplateRefusal where the chat template refuses them.

        Args:
            messages: {"role", "content"}; the last one is the response.
            conversational: False for bare strings, which a model without a chat template reads without role headers.
        """
        return self.reader.one(messages, conversational)

    def encode_pair(
        self, chosen: Sequence[Message], rejected: Sequence[Message], conversational: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of both sequences of a pair, exactly as training feeds them, a shared prompt cut alike."""
        return self.reader.pair(chosen, rejected, conversational)

    def rewards(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        tokens_per_batch: int | None = None,
        description: str = "Scoring",
        show_progress: bool = True,
    ) -> list[float]:
        """The reward of every sequence of ids, order kept; up to rounding they do not depend on the batches.

        Where the model reads packed pairs, what two sequences of a batch begin with is read once.

        Args:
            sequences: as `encode` gives them.
            batch_size, tokens_per_batch, description: as `idrm.evaluation.batching` has them.

        Raises:
            InputError: a reward that is not finite.
        """
        read = [tuple(ids) for ids in sequences]
        options = {
            "tokens_per_batch": tokens_per_batch,
            "description": description,
            "show_progress": show_progress,
        }
        pairs = neighbours(read, tokens_per_batch) if self.reads_packed_pairs and batch_size > 1 else []
        rewards: dict[tuple[int, ...], float] = {}
        if pairs:
            scores = score_in_batches(pairs, self._score_packed, batch_size=batch_size // 2, **options)
            for pair, (first, second) in zip(pairs, scores, strict=True):
                rewards |= {pair.first: first, pair.second: second}
        alone = [ids for ids in read if ids not in rewards]
        rewards |= zip(alone, score_in_batches(alone, self._score, batch_size=batch_size, **options), strict=True)
        return [rewards[ids] for ids in read]

    @torch.inference_mode()
    def _score_packed(self, batch: list[Neighbours]) -> Tensor:
        """(pairs, 2)."""
        packed = pack_pairs([pair.first for pair in batch], [pair.second for pair in batch])
        logits = self.model(packed_pairs=packed.to(self.model.device)).logits
        return self._checked(logits.view(2, -1).T)

    @torch.inference_mode()
    def _score(self, batch: list[tuple[int, ...]]) -> Tensor:
        pad = padding_id(self.model, batch)
        input_ids, attention_mask = padded_right(batch, pad, self.model.device)
        with pads_with(self.model.config, pad):
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return self._checked(logits.reshape(len(batch), -1)[:, 0])

    def _checked(self, rewards: Tensor) -> Tensor:
        if not rewards.isfinite().all():
            raise InputError(f"{self.model.name_or_path}: its rewards are not finite (in {rewards.dtype})")
        return rewards.double().cpu()


def require_reward_model(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a reward model; nothing of its weights is loaded.

    Raises:
        InputError: nothing loadable there, a language model, or a classifier of several labels.
    """
    config = load_config(name_or_path, trust_remote_code)
    architectures = ", ".join(config.architectures or ())
    if "LMHead" in architectures or "CausalLM" in architectures:
        raise InputError(
            f"{name_or_path}: is a language model ({architectures}); expected a sequence classifier of one label, or "
            "for a DPO policy --implicit_reward and its reference"
        )
    if config.num_labels != 1:
        raise InputError(f"{name_or_path}: is a classifier of {config.num_labels} labels; a reward model has one")
    return config


def load_reward_model(
    name_or_path: str,
    *,
    dtype: str = "float32",
    device: torch.device | str,
    max_length: int | None = None,
    attn_implementation: str | None = None,
    share_prompt: Literal["auto", "on", "off"] = "auto",
    trust_remote_code: bool = False,
) -> RewardModel:
    """Loads a sequence classifier of one label from a folder or the hub, from safetensors only.

    Args:
        dtype: "float32", "bfloat16", "float16", "float64" or "auto", as saved.
        device: where it goes.
        max_length: most tokens of a sequence; None for 2,048, or the model's limit where that is lower.
        attn_implementation: None leaves the choice to transformers.
        share_prompt: whether common beginnings of sequences are read once; "auto" wherever the model can.

    Raises:
        InputError: as `require_reward_model`; weights that cannot be loaded or that the checkpoint lacks, such as a
            reward head's; a slow tokenizer; more tokens asked for than the model reads; share_prompt "on" and a model
            that cannot.
    """
    config = require_reward_model(name_or_path, trust_remote_code=trust_remote_code)
    length = readable_length(config, max_length)
    tokenizer = load_tokenizer(name_or_path, trust_remote_code)
    reader = MessageReader(tokenizer, length)
    model = load_whole(
        AutoModelForSequenceClassification,
        name_or_path,
        dtype=dtype,
        config=config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    shares = share_prompt != "off" and _let_share(model, length, is_required=share_prompt == "on")
    return RewardModel(model.to(device).eval(), tokenizer, length, reader, shares)


def _let_share(model: PreTrainedModel, length: int, *, is_required: bool) -> bool:
    """Whether the model can be called with packed pairs; from here on it can."""
    refusal = packed_attention_refusal(model.config, model.config._attn_implementation, length)
    if refusal is None:
        try:
            read_packed_pairs(model)
        except InputError as error:
            refusal = str(error)
    if refusal is not None and is_required:
        raise InputError(f"--share_prompt on: {model.name_or_path}: {refusal}")
    if refusal is not None:
        logger.info("%s: what sequences begin with in common is read in each: %s.", model.name_or_path, refusal)
    return refusal is None


def padding_id(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> int:
    """An id to pad with on the right so that the last token that is not it is each sequence's own last one.

    That is the token which transformers pools. It is the model's own pad token wherever that one ends no sequence; with
    a pad token that is also EOS, transformers would pool the token before the last.
    """
    ends = {sequence[-1] for sequence in batch}
    own = model.config.get_text_config().pad_token_id
    if own is not None and 0 <= own < model.get_input_embeddings().num_embeddings and own not in ends:
        return own
    return next(candidate for candidate in range(len(ends) + 1) if candidate not in ends)


def padded_right(batch: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (sequences, longest) int64."""
    longest = max(len(ids) for ids in batch)
    input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in batch], device=device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    return input_ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


@contextlib.contextmanager
def pads_with(config: PreTrainedConfig, pad: int) -> Iterator[None]:
    """Makes transformers take this id for padding as it looks for the last token."""
    configs = [config, config.get_text_config()]
    before = [part.pad_token_id for part in configs]
    try:
        for part in configs:
            part.pad_token_id = pad
        yield
    finally:
        for part, own in zip(configs, before, strict=True):
            part.pad_token_id = own
