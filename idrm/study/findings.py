"""What a study found: every row's accuracy on all pairs, and what its difference from the baseline is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from idrm.evaluation.outcomes import Outcomes
from idrm.evaluation.statistics import Interval, bootstrap_interval, mcnemar, paired_difference, wilcoxon

# outcomes[row][seed][fold]: of the fold's pairs, by the run that was trained on the other folds.
RowOutcomes = Mapping[int, Sequence[Outcomes]]


@dataclass(frozen=True)
class Difference:
    """A row against the baseline, over the seeds that both have.

    Attributes:
        seeds: how many those are.
        mean: accuracy of the row minus that of the baseline.
        interval: 95%, prompts drawn again for these very runs.
        interval_over_runs: 95%, prompts and seeds drawn again: also about other runs. None for fewer than five seeds.
        mcnemar: a p-value for every seed, of that seed's two runs of each fold on all pairs.
        wilcoxon: p-value over the accuracies of every fold and seed.
        row_better, baseline_better: in how many of these folds and seeds.
    """

    seeds: int
    mean: float
    interval: Interval
    interval_over_runs: Interval | None
    mcnemar: tuple[float, ...]
    wilcoxon: float
    row_better: int
    baseline_better: int


@dataclass(frozen=True)
class RowFindings:
    """One row: means over its seeds of what all pairs, each tested once a seed, gave.

    Attributes:
        name: of the row.
        pairs: tested, a seed.
        accuracies: of every seed.
        interval: 95% of their mean, prompts drawn again.
        ties: share of pairs with equal rewards, which count as wrong.
        prefers_shorter: share of pairs of different lengths in which the shorter sequence got the higher reward.
        interaction_ratio: at the end of training, mean over the runs; None without an interaction loss, and where the
            maps to imitate are uniform themselves.
        difference: from the baseline; None for itself, and without one.
    """

    name: str
    pairs: int
    accuracies: tuple[float, ...]
    interval: Interval
    ties: float
    prefers_shorter: float
    interaction_ratio: float | None
    difference: Difference | None

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.accuracies))


def row_findings(
    name: str, outcomes: RowOutcomes, baseline: RowOutcomes | None, interaction_ratio: float | None
) -> RowFindings:
    """Of one row; `baseline` are the outcomes of another one."""
    won = _won(outcomes, outcomes)
    folds = [fold for of_seed in outcomes.values() for fold in of_seed]
    prompts = _prompts(outcomes)
    return RowFindings(
        name,
        pairs=won.shape[1],
        accuracies=tuple(won.mean(1)),
        interval=bootstrap_interval(won.mean(0), prompts),
        ties=float(np.concatenate([fold.tied for fold in folds]).mean()),
        prefers_shorter=_prefers_shorter(folds),
        interaction_ratio=interaction_ratio,
        difference=None if baseline is None else _difference(outcomes, baseline),
    )


def length_accuracy(outcomes: Sequence[Outcomes], training_prefers: Sequence[str]) -> float:
    """Accuracy on all pairs of one who knows lengths alone.

    Args:
        outcomes: every fold's, by any run.
        training_prefers: for each fold "shorter" or "longer", whichever wins more of the pairs of the other folds.
    """
    return float(
        np.concatenate(
            [fold.length_won(prefer) for fold, prefer in zip(outcomes, training_prefers, strict=True)]
        ).mean()
    )


def length_preference(outcomes: Sequence[Outcomes], fold: int) -> str:
    """Which length wins more of the pairs that a fold's runs were trained on: "shorter" or "longer"."""
    others = [other for index, other in enumerate(outcomes) if index != fold]
    shorter, longer = (np.concatenate([o.length_won(prefer) for o in others]).sum() for prefer in ("shorter", "longer"))
    return "shorter" if shorter >= longer else "longer"


def _difference(outcomes: RowOutcomes, baseline: RowOutcomes) -> Difference | None:
    seeds = [seed for seed in outcomes if seed in baseline]
    if not seeds:
        return None
    ours, theirs = _won(outcomes, seeds), _won(baseline, seeds)
    prompts = _prompts(outcomes)
    fold_scores = [[[fold.won.mean() for fold in of_row[seed]] for seed in seeds] for of_row in (outcomes, baseline)]
    our_scores, their_scores = (np.array(scores).ravel() for scores in fold_scores)
    fixed = paired_difference(ours, theirs, prompts)
    over_runs = paired_difference(ours, theirs, prompts, resample_seeds=True).interval if len(seeds) >= 5 else None
    return Difference(
        seeds=len(seeds),
        mean=fixed.mean,
        interval=fixed.interval,
        interval_over_runs=over_runs,
        mcnemar=tuple(mcnemar(a, b) for a, b in zip(ours, theirs, strict=True)),
        wilcoxon=wilcoxon(our_scores, their_scores),
        row_better=int((our_scores > their_scores).sum()),
        baseline_better=int((their_scores > our_scores).sum()),
    )


def _won(outcomes: RowOutcomes, seeds: Sequence[int] | RowOutcomes) -> np.ndarray:
    """(seeds, pairs) bool, fold after fold."""
    return np.stack([np.concatenate([fold.won for fold in outcomes[seed]]) for seed in seeds])


def _prompts(outcomes: RowOutcomes) -> np.ndarray:
    """(pairs,) the prompt of each."""
    return np.concatenate([fold.prompt for fold in next(iter(outcomes.values()))])


def _prefers_shorter(folds: Sequence[Outcomes]) -> float:
    shorter_won = total = 0
    for fold in folds:
        shorter, longer = fold.length_won("shorter"), fold.length_won("longer")
        shorter_won += int((shorter & fold.won).sum() + (longer & ~fold.won & ~fold.tied).sum())
        total += int((shorter | longer).sum())
    return shorter_won / total if total else 0.0
