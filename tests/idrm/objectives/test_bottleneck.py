"""InfoRM's bottleneck: its divergence, its noise, and the plain head that it becomes."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from idrm.errors import InputError
from idrm.objectives import GaussianBottleneck, attach_bottleneck
from idrm.objectives.bottleneck import head_name, with_folded_head


@pytest.fixture
def states():
    return torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bottleneck_of(divergence="paper", latent=12):
    torch.manual_seed(1)
    return GaussianBottleneck(16, latent, divergence, dtype=torch.float64)


def test_the_divergence_is_torchs_own(states):
    bottleneck = bottleneck_of()
    bottleneck(states)
    deviation = torch.exp(0.5 * bottleneck.log_variance(states))
    expected = kl_divergence(Normal(bottleneck.mean(states), deviation), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(bottleneck.take_divergence(), expected, rtol=1e-12, atol=1e-12)


def test_the_official_divergence_is_that_of_the_dimensions_averages(states):
    """Of 2B sequences the authors' code takes the mean; of a pair's two, ours are added up."""
    bottleneck = bottleneck_of("official")
    bottleneck(states)
    mean, log_variance = bottleneck.mean(states).mean(-1), bottleneck.log_variance(states).mean(-1)
    published = (-0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp())).mean()
    pairs = bottleneck.take_divergence()
    torch.testing.assert_close(2 * pairs.mean(), published, rtol=1e-12, atol=1e-12)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0))
    torch.testing.assert_close(2 * pairs, expected, rtol=1e-12, atol=1e-12)


def test_a_token_that_is_not_pooled_spoils_no_gradient():
    bottleneck = bottleneck_of().float()
    states = torch.randn(2, 16, requires_grad=True)
    with torch.no_grad():
        bottleneck.log_variance.weight.mul_(1000)
    rewards = bottleneck(states)
    (rewards[-1].sum() + bottleneck.take_divergence()[-1]).backward()
    assert states.grad[0].abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in bottleneck.parameters())


def test_the_divergences_gradient_is_the_formulas(states):
    bottleneck = bottleneck_of()
    mean, log_variance = bottleneck.mean(states), bottleneck.log_variance(states)
    bottleneck(states)
    gradients = torch.autograd.grad(
        bottleneck.take_divergence().sum(), list(bottleneck.parameters()), allow_unused=True
    )
    by_name = dict(zip(dict(bottleneck.named_parameters()), gradients, strict=True))
    # d/dmean = mean, d/dlog_variance = (variance - 1) / 2.
    rows = states.reshape(-1, 16)
    through_variance = 0.5 * (log_variance.exp() - 1).reshape(-1, 12)
    torch.testing.assert_close(by_name["mean.weight"], mean.reshape(-1, 12).T @ rows)
    torch.testing.assert_close(by_name["log_variance.weight"], through_variance.T @ rows)
    torch.testing.assert_close(by_name["log_variance.bias"], through_variance.sum(0))
    assert by_name["reward.weight"] is None

    def divergence(weight):
        torch.func.functional_call(bottleneck, {"mean.weight": weight}, (states,))
        return bottleneck.take_divergence()

    assert torch.autograd.gradcheck(divergence, bottleneck.mean.weight)


def test_training_samples_the_latent_and_evaluation_takes_its_mean(states):
    bottleneck = bottleneck_of()
    bottleneck.eval()
    mean = bottleneck.reward(bottleneck.mean(states))
    torch.testing.assert_close(bottleneck(states), mean, rtol=0, atol=0)
    bottleneck.train()
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([bottleneck(states) for _ in range(4000)])
    variance = (bottleneck.log_variance(states).exp() @ bottleneck.reward.weight.square().T).detach()
    error = (variance / 4000).sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * error).all()
    torch.testing.assert_close(samples.var(0), variance, rtol=0.15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_gives_the_rewards_of_the_mean(student_path, dtype):
    model = AutoModelForSequenceClassification.from_pretrained(student_path, dtype=dtype).eval()
    torch.manual_seed(2)
    bottleneck = attach_bottleneck(model, 128, "paper")
    assert model.score is bottleneck
    ids = torch.randint(3, 400, (4, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        saved = with_folded_head(model.state_dict(), head_name(model), keep_bottleneck=False)
        plain = AutoModelForSequenceClassification.from_pretrained(student_path, dtype=dtype).eval()
        plain.load_state_dict(saved)
        after = plain(input_ids=ids).logits
    rtol, atol = (0, 1e-6) if dtype == torch.float32 else (0.05, 0.05)
    assert before.abs().max() > 0.05
    torch.testing.assert_close(after, before, rtol=rtol, atol=atol)


def test_a_checkpoint_has_both_and_loads_into_a_bottleneck(student_path):
    model = AutoModelForSequenceClassification.from_pretrained(student_path)
    attach_bottleneck(model, 8, "paper")
    both = with_folded_head(model.state_dict(), "score", keep_bottleneck=True)
    assert {"score.weight", "score.mean.weight", "score.reward.weight", "score.log_variance.bias"} <= both.keys()
    other = AutoModelForSequenceClassification.from_pretrained(student_path)
    attach_bottleneck(other, 8, "paper")
    other.load_state_dict(both, strict=True)
    torch.testing.assert_close(other.score.mean.weight, model.score.mean.weight, rtol=0, atol=0)
    assert "score.weight" in both


def test_a_head_that_is_not_one_matrix_is_refused():
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    with pytest.raises(InputError, match="linear reward head without a bias, which BertForSequenceClassification"):
        attach_bottleneck(BertForSequenceClassification(config), 8, "paper")
