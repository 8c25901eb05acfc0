"""The average of the Id-RM paper's table on out-of-distribution benchmarks (arXiv 2508.02618, Table 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from idrm.evaluation import rmb
from idrm.evaluation.benchmark import Benchmark, Part, Score, mean_of_scores
from idrm.evaluation.rewardbench import SECTIONS

# RMB's two goals and RewardBench's four sections: their plain mean is the paper's average.
COLUMNS = ("RMB Helpful", "RMB Harmless", *(f"RewardBench {section}" for section in SECTIONS))
AVERAGE = "Mean of the paper's six columns"


def paper_average(columns: Mapping[str, float]) -> float:
    """The plain mean of the six columns; KeyError that names one that is not there."""
    return sum(columns[name] for name in COLUMNS) / len(COLUMNS)


def paper_scores(benchmarks: Sequence[Benchmark]) -> list[Score]:
    """The six columns and their mean over the items of RewardBench and RMB together; none where one is missing.

    Subsets are named `benchmark: subset`. RMB's columns are `rmb.helpful_and_harmless`: the paper does not say how it
    averages pairs and best-of-N.
    """
    columns: dict[str, Score] = {}
    for benchmark in benchmarks:
        if benchmark.kind == "rewardbench":
            found = {score.name: score for score in benchmark.scores if score.name in SECTIONS}
            columns |= {f"RewardBench {name}": _qualified(score, benchmark.name) for name, score in found.items()}
        elif benchmark.kind == "rmb":
            found = rmb.helpful_and_harmless(benchmark.scores)
            columns |= {f"RMB {name}": _qualified(score, benchmark.name) for name, score in found.items()}
    if any(name not in columns for name in COLUMNS):
        return []
    scores = [Score(name, columns[name].parts) for name in COLUMNS]
    return [*scores, mean_of_scores(AVERAGE, [(score, 1.0) for score in scores])]


def _qualified(score: Score, benchmark: str) -> Score:
    parts = tuple(
        Part(f"{benchmark}: {part.name}", part.weight, tuple(f"{benchmark}: {name}" for name in part.subsets))
        for part in score.parts
    )
    return Score(score.name, parts)
