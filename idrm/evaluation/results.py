"""From outcomes to the numbers that are reported: scores, intervals, ties and what length alone would get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from idrm.evaluation.benchmark import Benchmark, Score
from idrm.evaluation.outcomes import Outcomes
from idrm.evaluation.paper_average import paper_scores
from idrm.evaluation.statistics import Interval, bootstrap_interval

PREFERENCES = ("shorter", "longer")


@dataclass(frozen=True)
class Result:
    """One score of one model; shares from 0 to 1, weighted as the score is.

    Attributes:
        accuracy: share of items won; ties and what was not read are lost.
        interval: of the accuracy, prompts drawn again.
        ties: share of ties.
        unread: how many items the model could not read.
        length_only: accuracy of taking the shorter, and of taking the longer response, in the model's tokens.
        items, prompts: how many there are.
    """

    accuracy: float
    interval: Interval
    ties: float
    unread: int
    length_only: Mapping[str, float]
    items: int
    prompts: int

    @property
    def better_length(self) -> tuple[str, float]:
        """The better of the two length-only baselines: which one it is, and its accuracy."""
        name = max(PREFERENCES, key=lambda preference: self.length_only[preference])
        return name, self.length_only[name]

    def as_dict(self) -> dict[str, Any]:
        """What JSON has."""
        return {**asdict(self), "interval": list(self.interval), "length_only": dict(self.length_only)}


@dataclass(frozen=True)
class Table:
    """The scores of a benchmark, models side by side.

    Attributes:
        title: of the benchmark. version, notes, source: as it has them.
        scores: the rows.
        results: {score's name: {model: result}}.
    """

    title: str
    source: str
    version: str
    notes: Sequence[str]
    scores: Sequence[Score]
    results: Mapping[str, Mapping[str, Result]]


def tables_of(benchmarks: Sequence[Benchmark], outcomes: Sequence[Outcomes], confidence: float = 0.95) -> list[Table]:
    """A table for every benchmark, and where RewardBench and RMB are both there, one of the paper's six columns."""
    by_benchmark: dict[str, dict[str, Outcomes]] = {}
    for one in outcomes:
        by_benchmark.setdefault(one.benchmark, {})[one.model] = one
    tables = []
    for benchmark in benchmarks:
        by_model = by_benchmark[benchmark.name]
        results = {
            score.name: {model: result_of(score, one, confidence) for model, one in by_model.items()}
            for score in benchmark.scores
        }
        title, source = benchmark.name, benchmark.source
        tables.append(Table(title, source, benchmark.version, benchmark.notes, benchmark.scores, results))
    scores = paper_scores(benchmarks)
    if scores:
        used = [benchmark for benchmark in benchmarks if benchmark.kind in ("rewardbench", "rmb")]
        joined = {
            model: _joined([by_benchmark[benchmark.name][model] for benchmark in used])
            for model in by_benchmark[used[0].name]
        }
        results = {
            score.name: {model: result_of(score, one, confidence) for model, one in joined.items()} for score in scores
        }
        source = " and ".join(benchmark.source for benchmark in used)
        version = "; ".join(benchmark.version for benchmark in used)
        notes = ["RMB's columns are the means of pairs and best-of-N, micro: arXiv 2508.02618 does not say which."]
        tables.append(Table("The paper's six columns", source, version, notes, scores, results))
    return tables


def result_of(score: Score, outcomes: Outcomes, confidence: float = 0.95) -> Result:
    """One score of one model on one benchmark."""
    part_of = {subset: part.name for part in score.parts for subset in part.subsets}
    chosen = np.isin(outcomes.subset, list(part_of))
    subset, prompts = outcomes.subset[chosen], outcomes.prompt[chosen]
    won = outcomes.won[chosen]
    interval = bootstrap_interval(
        won,
        prompts,
        strata=[part_of[name] for name in subset],
        weights={part.name: part.weight for part in score.parts},
        confidence=confidence,
    )
    return Result(
        accuracy=score.within(subset, won),
        interval=interval,
        ties=score.within(subset, outcomes.tied[chosen]),
        unread=int(outcomes.unread[chosen].sum()),
        length_only={
            preference: score.within(subset, outcomes.length_won(preference)[chosen]) for preference in PREFERENCES
        },
        items=int(chosen.sum()),
        prompts=len(set(prompts)),
    )


def _joined(outcomes: Sequence[Outcomes]) -> Outcomes:
    """The items of several benchmarks as one, subsets named as `paper_scores` names them."""
    items = [replace(item, subset=f"{one.benchmark}: {item.subset}") for one in outcomes for item in one.items]
    return Outcomes(outcomes[0].model, "joined", items)
