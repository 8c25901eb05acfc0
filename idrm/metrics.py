"""Means over pairs of everything a reward model's run reports, from sums that ranks and batches can add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from idrm_kernels import MapLoss

# One row of these a pair. The last of them stand for the pair's two sequences together.
COLUMNS = (
    "pairs",
    "chosen_reward",
    "rejected_reward",
    "accuracy",
    "loss",
    "preference_loss",
    "interaction_loss",
    "intra_loss",
    "inter_loss",
    "compared_loss",
    "uniform_loss",
    "latent_kl",
    "length",
    "reward_squared",
    "length_squared",
    "reward_times_length",
)
# What evaluation reports; the second group only with an interaction loss, the third only with a bottleneck.
PREFERENCE_METRICS = ("loss", "preference_loss", "accuracy", "margin", "mean_reward", "reward_length_correlation")
INTERACTION_METRICS = ("interaction_loss", "intra_loss", "inter_loss", "interaction_ratio")
BOTTLENECK_METRICS = ("latent_kl",)


def pair_rows(
    rewards: Tensor,
    lengths: Tensor,
    loss: Tensor,
    preference_loss: Tensor,
    interaction: MapLoss | None,
    uniform_loss: Tensor | None,
    latent_kl: Tensor | None = None,
) -> Tensor:
    """(B, len(COLUMNS)) float64, one row a pair.

    Args:
        rewards: (2, B), chosen and rejected.
        lengths: (2, B), tokens of the sequences.
        loss, preference_loss: (B,), or scalars that are means over the B pairs, as all the following.
        interaction: losses before alpha; None for Bradley-Terry.
        uniform_loss: the interaction loss of a uniform map, where it was measured.
        latent_kl: of both sequences' latents together; None without a bottleneck.
    """
    rewards, lengths = rewards.detach().double(), lengths.double()
    chosen, rejected = rewards
    zero = chosen.new_zeros(())
    interaction = MapLoss(zero, zero, zero) if interaction is None else interaction
    columns = {
        "pairs": zero + 1,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "accuracy": chosen > rejected,
        "loss": loss,
        "preference_loss": preference_loss,
        "interaction_loss": interaction.loss,
        "intra_loss": interaction.intra,
        "inter_loss": interaction.inter,
        "compared_loss": zero if uniform_loss is None else interaction.loss,
        "uniform_loss": zero if uniform_loss is None else uniform_loss,
        "latent_kl": zero if latent_kl is None else latent_kl,
        "length": lengths.sum(0),
        "reward_squared": rewards.square().sum(0),
        "length_squared": lengths.square().sum(0),
        "reward_times_length": (rewards * lengths).sum(0),
    }
    return torch.stack([columns[name].detach().double().expand(len(chosen)) for name in COLUMNS], dim=1)


def metrics_from_sums(
    column_sums: Sequence[float], with_interaction: bool, with_bottleneck: bool = False
) -> dict[str, float]:
    """What is reported, from the sums of the columns over any number of pairs: means over pairs.

    interaction_ratio is the interaction loss over that of a uniform map, on the pairs where both were measured; it is
    absent where none were. reward_length_correlation is Pearson's over all sequences, 0 where either does not vary.
    """
    sums = dict(zip(COLUMNS, column_sums, strict=True))
    pairs = sums["pairs"]
    if not pairs:
        return {}
    reported = ["loss", "preference_loss", "accuracy"]
    if with_interaction:
        reported[2:2] = ["interaction_loss", "intra_loss", "inter_loss"]
    if with_bottleneck:
        reported += BOTTLENECK_METRICS
    metrics = {name: sums[name] / pairs for name in reported}
    if sums["uniform_loss"] > 0:
        metrics["interaction_ratio"] = sums["compared_loss"] / sums["uniform_loss"]
    metrics["margin"] = (sums["chosen_reward"] - sums["rejected_reward"]) / pairs
    metrics["mean_reward"] = (sums["chosen_reward"] + sums["rejected_reward"]) / (2 * pairs)
    metrics["reward_length_correlation"] = _reward_length_correlation(sums)
    return metrics


def _reward_length_correlation(sums: dict[str, float]) -> float:
    sequences = 2 * sums["pairs"]
    reward = (sums["chosen_reward"] + sums["rejected_reward"]) / sequences
    length = sums["length"] / sequences
    reward_variance = sums["reward_squared"] / sequences - reward**2
    length_variance = sums["length_squared"] / sequences - length**2
    # Below this a variance is the rounding of the sums.
    if reward_variance <= 1e-12 * reward**2 or length_variance <= 1e-12 * length**2:
        return 0.0
    covariance = sums["reward_times_length"] / sequences - reward * length
    return max(-1.0, min(1.0, covariance / math.sqrt(reward_variance * length_variance)))
