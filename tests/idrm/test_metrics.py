"""Means over pairs from sums of columns."""

import numpy as np
import pytest
import torch

from idrm.metrics import INTERACTION_METRICS, PREFERENCE_METRICS, metrics_from_sums, pair_rows
from idrm_kernels import MapLoss


def rows(seed=0, pairs=7, offset=0.0):
    source = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2, pairs, generator=source) + offset
    lengths = torch.randint(5, 90, (2, pairs), generator=source)
    losses = [torch.rand(pairs, generator=source) for _ in range(6)]
    interaction = MapLoss(*losses[2:5])
    return rewards, lengths, pair_rows(rewards, lengths, losses[0], losses[1], interaction, losses[5]), losses


def test_metrics_are_means_over_pairs():
    rewards, lengths, columns, losses = rows(offset=30.0)
    metrics = metrics_from_sums(columns.sum(0).tolist(), with_interaction=True)
    assert set(metrics) == {*PREFERENCE_METRICS, *INTERACTION_METRICS}
    for name, loss in zip(
        ("loss", "preference_loss", "interaction_loss", "intra_loss", "inter_loss"), losses, strict=False
    ):
        assert metrics[name] == pytest.approx(loss.mean().item())
    assert metrics["interaction_ratio"] == pytest.approx((losses[2].sum() / losses[5].sum()).item())
    assert metrics["accuracy"] == pytest.approx((rewards[0] > rewards[1]).float().mean().item())
    assert metrics["margin"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), abs=1e-6)
    assert metrics["mean_reward"] == pytest.approx(rewards.mean().item())
    expected = np.corrcoef(rewards.flatten(), lengths.flatten())[0, 1]
    assert metrics["reward_length_correlation"] == pytest.approx(expected, abs=1e-6)


def test_sums_of_batches_add_up_whatever_their_sizes():
    _, _, columns, _ = rows()
    parts = columns[:2].sum(0) + columns[2:].sum(0)
    assert metrics_from_sums(parts.tolist(), True) == pytest.approx(metrics_from_sums(columns.sum(0).tolist(), True))


def test_without_an_interaction_loss_none_is_reported():
    rewards, lengths = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[4, 4], [4, 4]])
    columns = pair_rows(rewards, lengths, torch.tensor(0.5), torch.tensor([0.4, 0.6]), None, None)
    metrics = metrics_from_sums(columns.sum(0).tolist(), with_interaction=False)
    assert set(metrics) == set(PREFERENCE_METRICS)
    assert metrics["accuracy"] == 0.5  # a tie is no success
    assert metrics["reward_length_correlation"] == 0.0  # lengths do not vary
    assert metrics["loss"] == pytest.approx(0.5)
    assert metrics["preference_loss"] == pytest.approx(0.5)
