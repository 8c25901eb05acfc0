"""DPO policies as reward models: beta * (log pi(y|x) - log pi_ref(y|x)), arXiv 2305.18290, equation 5.

The term of the prompt alone that the equation has is the same for all responses to a prompt, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from idrm.alignment.rendering import Message
from idrm.errors import InputError
from idrm.evaluation.batching import DEFAULT_BATCH_SIZE, score_in_batches
from idrm.evaluation.reading import MessageReader, load_config, load_tokenizer, load_whole, readable_length
from idrm.evaluation.reward_model import padded_right

DEFAULT_BETA = 0.1


@dataclass(frozen=True)
class PolicyInput:
    """What a policy reads: ids, of which the last `response_tokens` are scored. The first of all cannot be."""

    ids: tuple[int, ...]
    response_tokens: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImplicitRewardModel:
    """A policy and its reference, both in evaluation mode, used as a reward model.

    Attributes:
        policy: a causal language model.
        reference: what it was trained from; None for the policy's log-likelihood alone.
        beta: the factor of the rewards.
        tokenizer, max_length, reader: as `idrm.evaluation.reward_model.RewardModel` has them.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    beta: float
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    reader: MessageReader

    def encode(self, messages: Sequence[Message], conversational: bool) -> PolicyInput:
        """The ids of messages and how many of them are the last message's, its end of turn or EOS among them."""
        return self._input(self.reader.one(messages, conversational), messages, conversational)

    def encode_pair(
        self, chosen: Sequence[Message], rejected: Sequence[Message], conversational: bool
    ) -> tuple[PolicyInput, PolicyInput]:
        """The same of both sequences of a pair, a shared prompt cut alike."""
        first, second = self.reader.pair(chosen, rejected, conversational)
        return self._input(first, chosen, conversational), self._input(second, rejected, conversational)

    def rewards(
        self,
        sequences: Sequence[PolicyInput],
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        tokens_per_batch: int | None = None,
        description: str = "Scoring",
        show_progress: bool = True,
    ) -> list[float]:
        """The implicit reward of every input, order kept: a sum over response tokens.

        Raises:
            InputError: a reward that is not finite.
        """
        return score_in_batches(
            list(sequences),
            self._score,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            description=description,
            show_progress=show_progress,
        )

    def _input(self, ids: list[int], messages: Sequence[Message], conversational: bool) -> PolicyInput:
        tokens = self.reader.response_tokens(messages, conversational)
        return PolicyInput(tuple(ids), min(tokens, len(ids) - 1))

    def _score(self, batch: list[PolicyInput]) -> Tensor:
        rewards = response_log_likelihoods(self.policy, batch)
        if self.reference is not None:
            rewards = rewards - response_log_likelihoods(self.reference, batch)
        if not rewards.isfinite().all():
            raise InputError(f"{self.policy.name_or_path}: its implicit rewards are not finite ({self.policy.dtype})")
        return self.beta * rewards


@torch.inference_mode()
def response_log_likelihoods(model: PreTrainedModel, batch: Sequence[PolicyInput]) -> Tensor:
    """(sequences,) float64 on the CPU: log pi(response | prompt), summed over the response's tokens.

    No logits are formed for the positions before the first response of the batch begins.
    """
    # Any id does for padding: it stands on the right, where no causal model looks.
    input_ids, attention_mask = padded_right([sequence.ids for sequence in batch], 0, model.device)
    longest = input_ids.shape[1]
    first = min(len(sequence) - sequence.response_tokens for sequence in batch)
    if first == longest:
        return torch.zeros(len(batch), dtype=torch.float64)
    predicting = torch.arange(first - 1, longest - 1, device=model.device)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=predicting, use_cache=False
    ).logits
    sums = []
    for row, sequence in enumerate(batch):
        # A row at a time: the vocabulary in float32 is the largest tensor here.
        response = slice(len(sequence) - sequence.response_tokens, len(sequence))
        scores = logits[row, response.start - first : response.stop - first]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        target = input_ids[row, response, None]
        sums.append((scores.gather(1, target)[:, 0] - scores.logsumexp(1)).double().sum())
    return torch.stack(sums).cpu()


def require_policy(name_or_path: str, *, trust_remote_code: bool = False) -> None:
    """Raises InputError where there is no language model; nothing of its weights is loaded."""
    config = load_config(name_or_path, trust_remote_code)
    architectures = ", ".join(config.architectures or ())
    if "SequenceClassification" in architectures:
        raise InputError(
            f"{name_or_path}: is a sequence classifier ({architectures}); an implicit reward is a language model's"
        )


def load_implicit_reward_model(
    policy: str,
    reference: str | None,
    *,
    beta: float = DEFAULT_BETA,
    dtype: str = "float32",
    device: torch.device | str,
    max_length: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> ImplicitRewardModel:
    """Loads a DPO policy and its reference from folders or the hub, from safetensors only.

    Args:
        policy: the trained language model, which brings the tokenizer.
        reference: the model that its training began with; None for a reward without one.
        beta: positive. It moves no decision, only the size of rewards.
        dtype, device, max_length, attn_implementation: as `load_reward_model` has them.

    Raises:
        InputError: nothing loadable there, a classifier, weights that the checkpoint lacks, a reference that reads
            other tokens, a slow tokenizer, or more tokens asked for than the models read.
    """
    if not 0 < beta < float("inf"):
        raise InputError(f"--beta: expected a positive number, got {beta}")
    require_policy(policy, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(policy, trust_remote_code)
    length = readable_length(load_config(policy, trust_remote_code), max_length)
    if reference is not None:
        require_policy(reference, trust_remote_code=trust_remote_code)
        length = min(length, readable_length(load_config(reference, trust_remote_code), max_length))
        _require_same_tokens(policy, tokenizer, reference, load_tokenizer(reference, trust_remote_code))
    reader = MessageReader(tokenizer, length)
    models = []
    for name in (policy, reference):
        if name is None:
            models.append(None)
            continue
        model = load_whole(
            AutoModelForCausalLM,
            name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        models.append(model.to(device).eval())
    return ImplicitRewardModel(models[0], models[1], beta, tokenizer, length, reader)


def _require_same_tokens(
    policy: str,
    policy_tokenizer: PreTrainedTokenizerBase,
    reference: str,
    reference_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A token of both must have one id; a policy may have added some, which no reference can score."""
    ours, theirs = policy_tokenizer.get_vocab(), reference_tokenizer.get_vocab()
    other = next((token for token in theirs if ours.get(token) != theirs[token]), None)
    if other is not None:
        raise InputError(
            f"{reference}: reads other tokens than {policy} (for instance {other!r}); expected the model that the "
            "policy's training began with"
        )
