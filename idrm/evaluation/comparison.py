"""Two models, or two ways to train one with several seeds each, on the same items: is the difference real?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idrm.errors import InputError
from idrm.evaluation.benchmark import Score
from idrm.evaluation.catalogue import scores_of
from idrm.evaluation.outcomes import Outcomes, read_outcomes, require_same_items
from idrm.evaluation.statistics import (
    Interval,
    mcnemar,
    paired_difference,
    smallest_wilcoxon,
    wilcoxon,
)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the runs of one way to train, on the benchmarks that all of them were measured on.

    Attributes:
        label: in the table.
        runs: what was named, a folder or a file for each seed.
        outcomes: {benchmark: one for each run, in their order}.
    """

    label: str
    runs: Sequence[str]
    outcomes: dict[str, list[Outcomes]]


@dataclass(frozen=True)
class Comparison:
    """One score of both sides, shares from 0 to 1.

    Attributes:
        benchmark, score: what was measured.
        items, prompts, seeds: how many of each.
        first, second: the accuracy of every run.
        difference: first - second, mean over runs.
        interval: of the difference, prompts drawn again for these very runs.
        interval_over_seeds: seeds drawn again as well; None for one run.
        mcnemar: for every pair of runs the p-value of its items, all weighing alike.
        wilcoxon_over_seeds, wilcoxon_over_subsets: p-values of the signed-rank test over runs' accuracies, and over
            the subsets' accuracies (means of the runs); None where there is only one.
        subsets: how many subsets the last is over.
    """

    benchmark: str
    score: str
    items: int
    prompts: int
    seeds: int
    first: Sequence[float]
    second: Sequence[float]
    difference: float
    interval: Interval
    interval_over_seeds: Interval | None
    mcnemar: Sequence[float]
    wilcoxon_over_seeds: float | None
    wilcoxon_over_subsets: float | None
    subsets: int

    def as_dict(self) -> dict[str, Any]:
        """What JSON has, with the lowest p-values that so few seeds or subsets could give."""
        seeds = None if self.interval_over_seeds is None else list(self.interval_over_seeds)
        values = {**vars(self), "interval": list(self.interval), "interval_over_seeds": seeds}
        for over, count in (("seeds", self.seeds), ("subsets", self.subsets)):
            if values[f"wilcoxon_over_{over}"] is not None:
                values[f"lowest_wilcoxon_over_{over}"] = smallest_wilcoxon(count)
        return values


def read_side(paths: Sequence[str], label: str | None = None) -> Side:
    """Reads the outcomes of one side.

    Args:
        paths: an outcomes file or a folder of them (`idrm eval` writes OUT/outcomes/LABEL) for each seed.
        label: None for the model's own, or those of several joined by "+".

    Raises:
        InputError: no outcomes there, damaged ones, a folder with two files of one benchmark, or runs that share no
            benchmark or were asked different items.
    """
    runs = [_read_run(path) for path in paths]
    benchmarks = [name for name in runs[0] if all(name in run for run in runs)]
    if not benchmarks:
        raise InputError(f"{', '.join(paths)}: were measured on no benchmark that all of them share")
    for path, run in zip(paths[1:], runs[1:], strict=True):
        for name in benchmarks:
            require_same_items(runs[0][name], run[name], paths[0], path)
    labels = dict.fromkeys(next(iter(run.values())).model for run in runs)
    return Side(label or "+".join(labels), paths, {name: [run[name] for run in runs] for name in benchmarks})


def compare(first: Side, second: Side, *, confidence: float = 0.95) -> list[Comparison]:
    """Every score of every benchmark that both sides were measured on; runs are paired in order.

    Raises:
        InputError: another number of runs on either side, no common benchmark, or different items.
    """
    if len(first.runs) != len(second.runs):
        raise InputError(
            f"{first.label} and {second.label}: expected as many runs on both sides, which are paired in order, found "
            f"{len(first.runs)} and {len(second.runs)}"
        )
    common = [name for name in first.outcomes if name in second.outcomes]
    if not common:
        raise InputError(
            f"{first.label} and {second.label}: share no benchmark: {', '.join(first.outcomes)} and "
            f"{', '.join(second.outcomes)}"
        )
    comparisons = []
    for name in common:
        ours, theirs = first.outcomes[name], second.outcomes[name]
        require_same_items(ours[0], theirs[0], str(first.runs[0]), str(second.runs[0]))
        counts = Counter(ours[0].subset.tolist())
        for score in scores_of(str(ours[0].origin.get("kind", "pairs")), counts):
            if not score.is_detail:
                comparisons.append(_compare(score, ours, theirs, confidence))
    return comparisons


def _compare(score: Score, first: Sequence[Outcomes], second: Sequence[Outcomes], confidence: float) -> Comparison:
    part_of = {subset: part.name for part in score.parts for subset in part.subsets}
    chosen = np.isin(first[0].subset, list(part_of))
    subset, prompts = first[0].subset[chosen], first[0].prompt[chosen]
    a, b = (np.stack([run.won[chosen] for run in side]) for side in (first, second))
    sampling = {
        "strata": [part_of[name] for name in subset],
        "weights": {part.name: part.weight for part in score.parts},
        "confidence": confidence,
    }
    difference = paired_difference(a, b, prompts, **sampling)
    several = len(first) > 1
    over_seeds = paired_difference(a, b, prompts, resample_seeds=True, **sampling).interval if several else None
    accuracies = [[score.within(subset, won) for won in side] for side in (a, b)]
    names = sorted(set(subset.tolist()))
    by_subset = [[side[:, subset == name].mean() for name in names] for side in (a, b)]
    return Comparison(
        benchmark=first[0].benchmark,
        score=score.name,
        items=int(chosen.sum()),
        prompts=len(set(prompts.tolist())),
        seeds=len(first),
        first=accuracies[0],
        second=accuracies[1],
        difference=difference.mean,
        interval=difference.interval,
        interval_over_seeds=over_seeds,
        mcnemar=[mcnemar(ours, theirs) for ours, theirs in zip(a, b, strict=True)],
        wilcoxon_over_seeds=wilcoxon(*accuracies) if several else None,
        wilcoxon_over_subsets=wilcoxon(*by_subset) if len(names) > 1 else None,
        subsets=len(names),
    )


def _read_run(path: str) -> dict[str, Outcomes]:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    if not files:
        raise InputError(
            f"{path}: holds no outcomes; expected a file of `idrm eval`, or a folder of them such as OUT/outcomes/LABEL"
        )
    run: dict[str, Outcomes] = {}
    for file in files:
        outcomes = read_outcomes(file)
        if outcomes.benchmark in run:
            raise InputError(f"{path}: holds two files of the benchmark {outcomes.benchmark}; name one of them")
        run[outcomes.benchmark] = outcomes
    return run
