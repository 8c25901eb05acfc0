"""The preference losses against their formulas in float64, written out here."""

import math

import pytest
import torch

from idrm.objectives import PreferenceLoss, draw_pair_order
from idrm.objectives.preference_loss import agreement

PAIRS = 64


@pytest.fixture
def rewards():
    return torch.randn(2, PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def margin():
    return torch.randn(PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def order():
    return torch.rand(PAIRS, generator=torch.Generator().manual_seed(2)) < 0.5


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def test_by_default_it_is_bradley_terry(rewards):
    expected = exact([-log_sigmoid(chosen - rejected) for chosen, rejected in rewards.T.tolist()])
    torch.testing.assert_close(PreferenceLoss()(rewards), expected, rtol=1e-14, atol=0)


def test_adaptive_margin(rewards, margin):
    pairs = zip(*rewards.tolist(), margin.tolist(), strict=True)
    expected = exact([-log_sigmoid(chosen - rejected - m) for chosen, rejected, m in pairs])
    torch.testing.assert_close(PreferenceLoss()(rewards, margin), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing(rewards, margin, smoothing):
    pairs = zip(*rewards.tolist(), margin.tolist(), strict=True)
    expected = exact(
        [
            -(1 - smoothing) * log_sigmoid(chosen - rejected - m) - smoothing * log_sigmoid(rejected - chosen + m)
            for chosen, rejected, m in pairs
        ]
    )
    torch.testing.assert_close(PreferenceLoss(smoothing)(rewards, margin), expected, rtol=1e-13, atol=0)


def published_confidence_loss(first, second, first_is_better, weight):
    """Weak-to-strong's code: two logits, labels (B, 2), a threshold at the quantile of the labels' mean."""
    logits = torch.stack([first, second], dim=1)
    labels = torch.stack([first_is_better, ~first_is_better], dim=1).double()
    predictions = logits.softmax(dim=-1)[:, 0]
    threshold = torch.quantile(predictions, labels.mean(dim=0)[1])
    strong = torch.stack([predictions >= threshold, predictions < threshold], dim=1).double()
    target = (1 - weight) * labels + weight * strong
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.2, 1.0])
def test_the_confidence_term_is_the_published_one(rewards, order, progress):
    chosen, rejected = rewards
    weight = 0.5 * min(1, progress / 0.2)
    expected = published_confidence_loss(
        torch.where(order, chosen, rejected), torch.where(order, rejected, chosen), order, weight
    )
    loss = PreferenceLoss(confidence_weight=0.5)(rewards, chosen_is_first=order, progress=progress)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    plain = PreferenceLoss()(rewards)
    assert bool((loss != plain).any()) == (progress > 0)


def test_the_confidence_term_needs_a_drawn_order(rewards):
    """With chosen first in every pair, every pair is judged to be won by the first: nothing is said."""
    loss = PreferenceLoss(confidence_weight=0.75)
    for order in (torch.ones(PAIRS, dtype=torch.bool), torch.zeros(PAIRS, dtype=torch.bool)):
        torch.testing.assert_close(
            loss(rewards, chosen_is_first=order), PreferenceLoss()(rewards), rtol=1e-15, atol=1e-15
        )


def test_labels_against_the_model_lose_their_pull():
    """Of the pairs that are labelled against it the gradient turns round, once its judgement weighs more."""
    wrong = torch.arange(PAIRS) < 6
    logits = torch.where(wrong, -0.5, 4.0).double()
    order = torch.arange(PAIRS) % 2 == 0
    assert not agreement(logits, order)[wrong].any()
    rewards = torch.stack([logits, torch.zeros_like(logits)]).requires_grad_()
    loss = PreferenceLoss(confidence_weight=0.75, confidence_warmup=0)(rewards, chosen_is_first=order)
    (gradient,) = torch.autograd.grad(loss.sum(), rewards)
    assert (gradient[0][wrong] > 0).all()
    (plain,) = torch.autograd.grad(PreferenceLoss()(rewards).sum(), rewards)
    assert (plain[0][wrong] < 0).all()


@pytest.mark.parametrize("firsts", [0, 1, 5, PAIRS])
def test_as_many_firsts_are_named_as_there_are(firsts):
    source = torch.Generator().manual_seed(firsts)
    logits = torch.randn(PAIRS, generator=source)
    order = torch.randperm(PAIRS, generator=source) < firsts
    named_first = agreement(logits, order) == order
    assert named_first.sum() == firsts
    in_favour = torch.where(order, logits, -logits)
    assert firsts in (0, PAIRS) or in_favour[named_first].min() >= in_favour[~named_first].max()


def test_everything_together_is_a_cross_entropy_with_its_target(rewards, margin, order):
    loss = PreferenceLoss(label_smoothing=0.1, confidence_weight=0.5, confidence_warmup=0.5)
    logits = rewards[0] - rewards[1] - margin
    weight = 0.5 * 0.25 / 0.5
    target = (1 - weight) * 0.9 + weight * agreement(logits, order).double()
    probability = 1 / (1 + torch.exp(-logits))
    expected = -(target * probability.log() + (1 - target) * (1 - probability).log())
    torch.testing.assert_close(
        loss(rewards, margin, chosen_is_first=order, progress=0.25), expected, rtol=1e-10, atol=1e-12
    )


def test_gradients(rewards, margin, order):
    rewards = rewards[:, :8].clone().requires_grad_()
    loss = PreferenceLoss(label_smoothing=0.2, confidence_weight=0.5)
    assert torch.autograd.gradcheck(lambda r: loss(r, margin[:8], chosen_is_first=order[:8], progress=0.1), rewards)


def test_the_drawn_order_is_of_the_pair_and_the_seed_and_not_of_its_label(encoded_pairs):
    drawn = draw_pair_order(encoded_pairs, seed=0)["chosen_is_first"][:]
    assert draw_pair_order(encoded_pairs, seed=0)["chosen_is_first"][:] == drawn
    assert draw_pair_order(encoded_pairs, seed=1)["chosen_is_first"][:] != drawn
    assert 0.25 < sum(drawn) / len(drawn) < 0.75
    exchanged = encoded_pairs.rename_columns(
        {"chosen_input_ids": "rejected_input_ids", "rejected_input_ids": "chosen_input_ids"}
    )
    assert draw_pair_order(exchanged, seed=0)["chosen_is_first"][:] == [not first for first in drawn]
