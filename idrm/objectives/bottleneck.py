"""InfoRM's variational information bottleneck in the place of a reward head.

Source: "InfoRM: Mitigating Reward Hacking in RLHF via Information-Theoretic Reward Modeling", arXiv 2402.09345. A
linear encoder gives mean and log variance of a Gaussian latent, a linear decoder its reward; latent 128 and beta 0.1
there.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from idrm.errors import InputError

# Keeps the exponentials of tokens that are not pooled, and whose divergence nobody asks for, finite in any dtype.
MAX_LOG_VARIANCE = 20.0


class GaussianBottleneck(nn.Module):
    """Reward of hidden states through a Gaussian latent: sampled in training, its mean in evaluation.

    Neither the mean nor the reward has an additive constant, so that the path of an evaluation is one matrix,
    `reward.weight @ mean.weight`, which a plain reward head of transformers can hold.

    Args:
        hidden_size: of the states.
        latent_size: of the latent.
        divergence: "paper" sums the KL divergences of a latent's dimensions. "official" is what the authors' code does
            (openrlhf/models/model_inform.py): the divergence of one Gaussian with the dimensions' mean of the means
            and mean of the log variances, and of a pair the mean of its two sequences, so that each counts half.
    """

    def __init__(self, hidden_size: int, latent_size: int, divergence: Literal["paper", "official"], **factory: Any):
        super().__init__()
        self.mean = nn.Linear(hidden_size, latent_size, bias=False, **factory)
        self.log_variance = nn.Linear(hidden_size, latent_size, **factory)
        self.reward = nn.Linear(latent_size, 1, bias=False, **factory)
        self._kind = divergence
        self._divergence: Tensor | None = None
        # A checkpoint has the folded weight beside those that it was folded from (`with_folded_head`).
        self.register_load_state_dict_pre_hook(_drop_folded_weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Rewards (..., 1) of states (..., hidden_size); their KL divergences wait for `take_divergence`."""
        mean, log_variance = self.mean(hidden_states), self.log_variance(hidden_states).clamp(max=MAX_LOG_VARIANCE)
        precise = torch.promote_types(mean.dtype, torch.float32)
        self._divergence = self._divergence_of(mean.to(precise), log_variance.to(precise))
        if self.training:
            mean = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.reward(mean)

    def _divergence_of(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        if self._kind == "official":
            return 0.5 * _standard_divergence(mean.mean(-1), log_variance.mean(-1))
        return _standard_divergence(mean, log_variance).sum(-1)

    def take_divergence(self) -> Tensor:
        """KL(N(mean, variance) || N(0, 1)) of every state of the last forward, (...), float32 or better.

        A pair's is the sum of those of its two sequences.
        """
        divergence, self._divergence = self._divergence, None
        return divergence


def _standard_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)


def attach_bottleneck(
    model: PreTrainedModel, latent_size: int, divergence: Literal["paper", "official"]
) -> GaussianBottleneck:
    """Puts a new bottleneck in the place of a model's reward head, whose weights are dropped.

    Under ZeRO-3, DeepSpeed partitions it as it takes the model.

    Raises:
        InputError: the model's reward head is not one linear layer without a bias.
    """
    name = head_name(model)
    head = model.get_submodule(name)
    factory = {"dtype": head.weight.dtype, "device": head.weight.device}
    bottleneck = GaussianBottleneck(head.in_features, latent_size, divergence, **factory)
    model.set_submodule(name, bottleneck.train(model.training))
    return bottleneck


def head_name(model: PreTrainedModel) -> str:
    """The name of the one module beside the decoder, a linear layer of one output or the bottleneck in its place.

    Raises:
        InputError: there is none, or another one.
    """
    beside = {name: module for name, module in model.named_children() if name != model.base_model_prefix}
    if len(beside) == 1:
        name, head = next(iter(beside.items()))
        plain = isinstance(head, nn.Linear) and head.out_features == 1 and head.bias is None
        if plain or isinstance(head, GaussianBottleneck):
            return name
    raise InputError(
        f"--inform_latent_size: takes the place of a linear reward head without a bias, which {type(model).__name__} "
        "does not have"
    )


def with_folded_head(state_dict: dict[str, Tensor], name: str, *, keep_bottleneck: bool) -> dict[str, Tensor]:
    """A model's weights with those of its bottleneck `name` folded into one head, which gives an evaluation's rewards.

    Args:
        keep_bottleneck: whether the bottleneck's own weights stay beside it, for a run that is to go on.
    """
    reward, mean = (state_dict[f"{name}.{part}.weight"] for part in ("reward", "mean"))
    folded = (reward.double() @ mean.double()).to(mean.dtype)
    rest = {key: value for key, value in state_dict.items() if keep_bottleneck or not key.startswith(f"{name}.")}
    return {**rest, f"{name}.weight": folded}


def _drop_folded_weight(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}weight", None)
