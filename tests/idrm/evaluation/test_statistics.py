"""Bootstrap intervals, and tests of two models."""

import itertools

import numpy as np
import pytest

from idrm.evaluation.statistics import (
    bootstrap_interval,
    mcnemar,
    paired_difference,
    smallest_wilcoxon,
    wilcoxon,
)


def drawn_one_by_one(values, groups, resamples, seed):
    """The definition: draw as many groups as there are, and take the mean of all their items."""
    rng = np.random.default_rng(seed)
    names = sorted(set(groups))
    items = {name: [value for value, group in zip(values, groups, strict=True) if group == name] for name in names}
    means = []
    for _ in range(resamples):
        drawn = [value for index in rng.integers(len(names), size=len(names)) for value in items[names[index]]]
        means.append(np.mean(drawn))
    return np.quantile(means, [0.025, 0.975])


def test_an_interval_is_that_of_groups_drawn_one_by_one():
    rng = np.random.default_rng(1)
    groups = rng.integers(40, size=150)
    values = (rng.random(150) < 0.3 + 0.01 * groups).astype(float)
    expected = drawn_one_by_one(values, groups, 4000, seed=2)
    assert bootstrap_interval(values, groups) == pytest.approx(expected, abs=0.006)
    # Items of a prompt go together: as if they were independent, the interval would be too narrow.
    alone = bootstrap_interval(np.repeat(values[:30], 5), np.arange(150))
    together = bootstrap_interval(np.repeat(values[:30], 5), np.repeat(np.arange(30), 5))
    assert together.high - together.low == pytest.approx(np.sqrt(5) * (alone.high - alone.low), rel=0.1)


@pytest.mark.parametrize(("confidence", "deviations"), [(0.95, 1.96), (0.68, 0.994)])
def test_the_interval_of_many_items_is_that_of_the_normal_distribution(confidence, deviations):
    values = np.random.default_rng(3).normal(2.0, 0.5, size=3000)
    interval = bootstrap_interval(values, range(3000), confidence=confidence, resamples=4000)
    error = deviations * values.std() / np.sqrt(3000)
    assert interval == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


def test_an_interval_is_the_same_for_the_same_seed_and_ends_at_certainty():
    values = np.random.default_rng(4).random(30)
    assert bootstrap_interval(values, range(30)) == bootstrap_interval(values, range(30))
    assert bootstrap_interval(values, range(30)) != bootstrap_interval(values, range(30), seed=1)
    assert bootstrap_interval(np.ones(30), range(30)) == (1.0, 1.0)


def test_strata_keep_their_sizes_and_weights():
    rng = np.random.default_rng(5)
    strata = ["a"] * 100 + ["b"] * 400
    values = np.concatenate([rng.random(100) < 0.9, rng.random(400) < 0.4]).astype(float)
    a, b = values[:100], values[100:]
    interval = bootstrap_interval(values, range(500), strata=strata, weights={"a": 3.0, "b": 1.0})
    mean = 0.75 * a.mean() + 0.25 * b.mean()
    error = 1.96 * np.sqrt(0.75**2 * a.var() / 100 + 0.25**2 * b.var() / 400)
    assert interval == pytest.approx((mean - error, mean + error), abs=0.1 * error)
    # Drawn among all, the shares of a and b would vary and widen this interval of two constants.
    certain = bootstrap_interval([1.0] * 100 + [0.0] * 400, range(500), strata=strata)
    assert certain == (0.5, 0.5)


def test_a_group_in_two_strata_is_drawn_once_for_both():
    # In every prompt the one stratum wins what the other loses, so that their mean cannot vary.
    won = (np.random.default_rng(6).random(60) < 0.5).astype(float)
    values, groups = np.concatenate([won, 1 - won]), np.tile(np.arange(60), 2)
    interval = bootstrap_interval(values, groups, strata=["x"] * 60 + ["y"] * 60)
    assert interval == pytest.approx((0.5, 0.5))


def test_groups_of_combinations_of_strata_that_no_other_has_vary_too():
    # 190 prompts, each in its own two of 20 strata.
    pairs = list(itertools.combinations(range(20), 2))
    values = (np.random.default_rng(9).random(len(pairs)) < 0.7).astype(float)
    items = {
        "values": np.repeat(values, 2),
        "groups": np.repeat(np.arange(len(pairs)), 2),
        "strata": np.array(pairs).ravel(),
    }
    # All strata are of one size, so that the mean of their means is that of the prompts.
    error = 1.96 * values.std() / np.sqrt(len(pairs))
    assert bootstrap_interval(**items) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


def test_few_unusual_groups_leave_the_usual_ones_interval():
    # 200 prompts in x, 200 in y, and one that has an item in both.
    won = (np.random.default_rng(10).random(400) < 0.6).astype(float)
    usual = {"values": won, "groups": np.arange(400), "strata": ["x"] * 200 + ["y"] * 200}
    more = {
        "values": np.append(won, [1.0, 1.0]),
        "groups": np.append(np.arange(400), [400, 400]),
        "strata": [*usual["strata"], "x", "y"],
    }
    assert bootstrap_interval(**more) == pytest.approx(bootstrap_interval(**usual), abs=0.01)
    # A stratum's only prompt says nothing of others, and cannot make it empty.
    alone = bootstrap_interval([1.0, 0.0, 0.0], ["p", "p", "q"], strata=["x", "y", "y"], weights={"x": 1.0})
    assert alone == (1.0, 1.0)


def test_a_paired_difference_cancels_what_both_share():
    rng = np.random.default_rng(7)
    hard = rng.random(500)
    a = (hard < 0.65).astype(float)
    b = (hard < 0.60).astype(float)
    difference = paired_difference(a, b, range(500))
    assert difference.mean == pytest.approx(a.mean() - b.mean())
    error = 1.96 * (a - b).std() / np.sqrt(500)
    assert difference.interval == pytest.approx((difference.mean - error, difference.mean + error), abs=0.15 * error)


def test_a_paired_difference_over_seeds_may_draw_seeds_too():
    rng = np.random.default_rng(8)
    # Seeds differ by far more than prompts do.
    b = np.zeros((4, 300))
    a = np.array([[0.3], [-0.2], [0.1], [0.0]]) + 0.01 * rng.normal(size=(4, 300))
    prompts = paired_difference(a, b, range(300))
    both = paired_difference(a, b, range(300), resample_seeds=True)
    assert prompts.mean == both.mean == pytest.approx(a.mean())
    assert prompts.interval.high - prompts.interval.low < 0.01
    # The mean of four numbers drawn from these four: a standard deviation of 0.18 / 2.
    assert both.interval.high - both.interval.low == pytest.approx(2 * 1.96 * 0.18 / 2, rel=0.2)


def test_mcnemar_is_the_binomial_test_of_what_one_alone_wins():
    # 8 against 2: p = 2 (1 + 10 + 45) / 1024.
    a = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0] * 5, dtype=bool)
    b = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5, dtype=bool)
    assert mcnemar(a, b) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def signed_rank(differences):
    """The two-sided p-value by all choices of signs, mean ranks for ties."""
    size = np.abs(differences)
    ranks = np.array([(size < s).sum() + ((size == s).sum() + 1) / 2 for s in size])
    total = ranks.sum()
    observed = abs(ranks[differences > 0].sum() - total / 2)
    signs = itertools.product((0, 1), repeat=len(ranks))
    return np.mean([abs(np.dot(choice, ranks) - total / 2) >= observed - 1e-9 for choice in signs])


@pytest.mark.parametrize(
    "differences",
    [
        (1, 2, 3, 4, 5),
        (1, -2, 3, 4, 5, 6),
        (2, 2, -2, 5, 7, 7, 1),
        (3, -3),
        (4,),
        (1, 1, 1, 1, 1, -1, 2, 2, 3, -4, 5, 5, 6),
    ],
)
def test_wilcoxon_is_exact_for_few_scores_with_and_without_ties(differences):
    a = np.full(len(differences), 0.5)
    b = a - np.array(differences) / 100
    assert wilcoxon(a, b) == pytest.approx(signed_rank(np.array(differences)))
    assert wilcoxon(a, b) >= smallest_wilcoxon(len(differences)) - 1e-12


def test_wilcoxon_leaves_out_equal_scores():
    a, b = [0.6, 0.7, 0.5, 0.8], [0.5, 0.5, 0.5, 0.5]
    assert wilcoxon(a, b) == wilcoxon([0.6, 0.7, 0.8], [0.5, 0.5, 0.5]) == pytest.approx(0.25)
    assert wilcoxon(a, a) == 1.0
    # 0.3 - 0.2 and 0.2 - 0.1 are the same difference, if not in binary: a tie of ranks.
    assert wilcoxon([0.3, 0.2, 0.1, 0.9], [0.2, 0.1, 0.2, 0.5]) == pytest.approx(signed_rank(np.array([1, 1, -1, 4])))


def test_five_seeds_cannot_reach_five_percent():
    assert wilcoxon([0.7] * 5, [0.6, 0.59, 0.58, 0.57, 0.56]) == smallest_wilcoxon(5) == 0.0625


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval([], []),
        lambda: bootstrap_interval([1.0, float("nan")], [0, 1]),
        lambda: bootstrap_interval([1.0, 2.0], [0]),
        lambda: bootstrap_interval([1.0], [0], strata=["a"], weights={"b": 1.0}),
        lambda: bootstrap_interval([1.0], [0], confidence=95),
        lambda: paired_difference(np.zeros((2, 3)), np.zeros(3), range(3)),
        lambda: mcnemar([True], [True, False]),
        lambda: wilcoxon([0.5], [0.5, 0.6]),
    ],
)
def test_what_cannot_be_counted_is_refused(call):
    with pytest.raises(ValueError):
        call()
