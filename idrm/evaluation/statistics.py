"""Intervals and tests for means over items that share prompts, and for the differences of two models."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# How many resampled numbers are held at once: 64 MiB of float64.
_NUMBERS_AT_ONCE = 1 << 23
# Groups of one combination of strata that are drawn among themselves; of fewer, resamples would vary too little.
_FEWEST_ALIKE = 10
# Differences of scores that agree to so many digits are tied: 0.61 - 0.60 is not 0.02 - 0.01 in binary.
_DIGITS_OF_A_SCORE = 12


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean of a - b, and its confidence interval."""

    mean: float
    interval: Interval


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    strata: Sequence[Hashable] | np.ndarray | None = None,
    weights: Mapping[Hashable, float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of a mean over items, whole groups being drawn again.

    Args:
        values: (items,) numbers.
        groups: (items,) which items are drawn together: those of one prompt, which are not independent.
        strata: (items,) parts whose means are averaged, such as the subsets of a benchmark; None for the plain mean.
            A group may reach into several. Groups are drawn among those that lie in the same strata, so that each
            stratum keeps its groups' number. Where fewer than 10 do that share a stratum with others, such a group is
            not drawn but weighted by an exponential variable of mean 1, as in the Bayesian bootstrap.
        weights: of the strata's means; those left out count nothing. None: all alike.
        confidence: share of resampled means that lie within.
        resamples: how many are drawn.
        seed: of the generator; equal arguments give equal intervals.

    Raises:
        ValueError: no values, values that are not finite, lengths that differ, or no stratum with a weight.
    """
    values = _finite(values)
    if values.ndim != 1:
        raise ValueError(f"values: expected (items,), got {values.shape}")
    means = _resampled_means(values[None], groups, strata, weights, resamples, seed, resample_seeds=False)
    return _percentiles(means, confidence)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    strata: Sequence[Hashable] | np.ndarray | None = None,
    weights: Mapping[Hashable, float] | None = None,
    resample_seeds: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """The mean of a - b over items and seeds, with a bootstrap interval over groups.

    Args:
        a, b: (items,), or (seeds, items) whose rows are paired in order.
        groups, strata, weights: (items,) and the strata's weights, as for `bootstrap_interval`.
        resample_seeds: draw seeds again as well, independently of the groups: the interval is then about other runs
            too. Without it, it is about other prompts for these very runs.
        confidence, resamples, seed: as for `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`, or shapes that differ.
    """
    a, b = np.atleast_2d(_finite(a)), np.atleast_2d(_finite(b))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a and b: expected the same (seeds, items), got {a.shape} and {b.shape}")
    differences = a - b
    means = _resampled_means(differences, groups, strata, weights, resamples, seed, resample_seeds)
    _, stratum, weight = _weighted_strata(strata, weights, differences.shape[1])
    by_stratum = np.bincount(stratum, differences.mean(0)) / np.bincount(stratum)
    return PairedDifference(float(by_stratum @ weight), _percentiles(means, confidence))


def mcnemar(a_won: ArrayLike, b_won: ArrayLike) -> float:
    """The exact two-sided p-value that a and b win equally often, from the items where one alone does (binomial).

    Args:
        a_won, b_won: (items,) bool, of the same items.

    Raises:
        ValueError: shapes that differ.
    """
    a_won, b_won = np.asarray(a_won, dtype=bool), np.asarray(b_won, dtype=bool)
    if a_won.shape != b_won.shape or a_won.ndim != 1:
        raise ValueError(f"a_won and b_won: expected the same items, got {a_won.shape} and {b_won.shape}")
    only_a, only_b = int((a_won & ~b_won).sum()), int((b_won & ~a_won).sum())
    if not only_a + only_b:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def wilcoxon(a_scores: ArrayLike, b_scores: ArrayLike) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test for paired scores, one for each seed or subset.

    Equal scores are left out, as Wilcoxon did; where all are equal the p-value is 1. It is exact for up to 13 pairs,
    and up to 50 without ties. Of n pairs it cannot be below `smallest_wilcoxon`.

    Raises:
        ValueError: shapes that differ, no scores, or scores that are not finite.
    """
    a_scores, b_scores = _finite(a_scores), _finite(b_scores)
    if a_scores.shape != b_scores.shape or a_scores.ndim != 1:
        raise ValueError(f"a_scores and b_scores: expected pairs, got {a_scores.shape} and {b_scores.shape}")
    differences = np.round(a_scores - b_scores, _DIGITS_OF_A_SCORE)
    differences = differences[differences != 0]
    if len(differences) < 2:
        return 1.0
    method = stats.PermutationMethod(n_resamples=2**14) if len(differences) <= 13 else "auto"
    return float(stats.wilcoxon(differences, method=method).pvalue)


def smallest_wilcoxon(pairs: int) -> float:
    """The lowest p-value that `wilcoxon` can give for so many pairs: 2 / 2^pairs, 0.0625 for five."""
    return min(1.0, 2.0 ** (1 - pairs))


def _finite(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("expected finite numbers, at least one")
    return values


def _numbered(labels: Sequence[Hashable] | np.ndarray) -> tuple[list[Hashable], np.ndarray]:
    """The distinct labels in order of appearance, and for each item the number of its label."""
    numbers: dict[Hashable, int] = {}
    numbered = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
    return list(numbers), numbered


def _weighted_strata(
    strata: Sequence[Hashable] | np.ndarray | None, weights: Mapping[Hashable, float] | None, items: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many strata there are, each item's, and the weight of each in the mean, 1 together."""
    names, stratum = _numbered([0] * items if strata is None else strata)
    weight = np.array([1.0 if weights is None else weights.get(name, 0.0) for name in names])
    if weight.sum() <= 0:
        raise ValueError("weights: expected a positive weight for a stratum that has items")
    return len(names), stratum, weight / weight.sum()


def _resampled_means(
    values: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    strata: Sequence[Hashable] | np.ndarray | None,
    weights: Mapping[Hashable, float] | None,
    resamples: int,
    seed: int,
    resample_seeds: bool,
) -> np.ndarray:
    """(resamples,) weighted means of the strata's means of (seeds, items) values."""
    if len(groups) != values.shape[1] or (strata is not None and len(strata) != values.shape[1]):
        raise ValueError("groups and strata: expected one of each for every item")
    rng = np.random.default_rng(seed)
    if resample_seeds:
        runs = len(values)
        run_weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    else:
        values, run_weights = values.mean(0, keepdims=True), np.ones((resamples, 1))
    num_strata, stratum, weight = _weighted_strata(strata, weights, values.shape[1])
    names, group = _numbered(groups)
    cell, size = group * num_strata + stratum, len(names) * num_strata
    # Per group: the sums of all runs and strata, then the counts of the strata.
    sums = [np.bincount(cell, row, minlength=size).reshape(-1, num_strata) for row in values]
    counts = np.bincount(cell, minlength=size).reshape(-1, num_strata).astype(float)
    rows = np.hstack([*sums, counts])
    total = np.zeros((resamples, rows.shape[1]))
    # Groups that lie in the same strata are exchangeable; none of these parts can come out empty.
    patterns, part, sizes = np.unique(counts > 0, axis=0, return_inverse=True, return_counts=True)
    part = part.reshape(-1)
    # A group of an unusual pattern is its part's only one, and drawn by itself it would never vary.
    is_shared = (patterns & (patterns.sum(0) > 1)).any(1)
    is_rare = is_shared & (sizes < _FEWEST_ALIKE)
    for number in np.flatnonzero(~is_rare):
        for drawn_rows, drawn in _draws(rows[part == number], resamples, rng):
            total[drawn_rows] += drawn
    rare = rows[is_rare[part]]
    if len(rare):
        step = max(1, _NUMBERS_AT_ONCE // len(rare))
        for start in range(0, resamples, step):
            stop = min(start + step, resamples)
            total[start:stop] += rng.standard_exponential((stop - start, len(rare))) @ rare
    drawn_sums = total[:, :-num_strata].reshape(resamples, len(values), num_strata)
    drawn_sums = (drawn_sums * run_weights[:, :, None]).sum(1)
    return (drawn_sums / total[:, -num_strata:]) @ weight


def _draws(rows: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[tuple[slice, np.ndarray]]:
    """Draws as many of the rows as there are, with replacement, and gives their sums: (slice, (n, columns)) in turn."""
    # How often each of n rows is drawn is multinomial; rows that are equal count as one kind of row.
    kinds, sizes = np.unique(rows, axis=0, return_counts=True)
    chances = sizes / sizes.sum()
    step = max(1, _NUMBERS_AT_ONCE // len(kinds))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        yield slice(start, stop), rng.multinomial(len(rows), chances, size=stop - start) @ kinds


def _percentiles(means: np.ndarray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
