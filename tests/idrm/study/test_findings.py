"""A study's findings, from outcomes that are known."""

import numpy as np
import pytest

from idrm.evaluation.outcomes import Outcome, Outcomes
from idrm.study.findings import length_accuracy, length_preference, row_findings


def fold(won: list[int], name: str, chosen_lengths: list[int] | None = None) -> Outcomes:
    """Pairs that were won (1), lost (0) or tied (-1); every two share a prompt; rejected sequences have 10 tokens."""
    lengths = chosen_lengths or [5] * len(won)
    items = [
        Outcome(f"{name}-{i}", "", f"{name}-{i // 2}", float(w), (0.5 if w >= 0 else -1.0,), length, (10,))
        for i, (w, length) in enumerate(zip(won, lengths, strict=True))
    ]
    return Outcomes("model", "pairs", items)


BASELINE = {
    0: [fold([1, 0, 1, 0], "a"), fold([1, 1, 0, 0, 0, 0], "b")],
    1: [fold([1, 1, 1, 0], "a"), fold([0, 1, 0, 0, 0, 0], "b")],
    2: [fold([1, 1, 1, 1], "a"), fold([1, 1, 1, 1, 1, 1], "b")],
}
ROW = {
    0: [fold([1, 1, 1, 0], "a"), fold([1, 1, 1, 0, 0, 0], "b")],
    1: [fold([1, 1, 1, 1], "a"), fold([0, 1, 0, 0, 0, -1], "b")],
}


def test_a_row_is_compared_over_the_seeds_that_both_have():
    found = row_findings("row", ROW, BASELINE, 0.9)
    assert found.pairs == 10
    assert found.accuracies == (0.6, 0.5)
    assert found.accuracy == pytest.approx(0.55)
    assert found.interval.low < 0.55 < found.interval.high
    assert found.ties == pytest.approx(1 / 20)
    assert found.interaction_ratio == 0.9
    difference = found.difference
    assert difference.seeds == 2
    assert difference.mean == pytest.approx(0.55 - (0.4 + 0.4) / 2)
    # Two pairs are won by the row alone, none by the baseline alone: 2 / 2^2.
    assert difference.mcnemar[0] == pytest.approx(0.5)
    assert difference.mcnemar[1] == pytest.approx(1.0)
    assert (difference.row_better, difference.baseline_better) == (3, 0)
    assert difference.interval_over_runs is None  # two seeds say nothing about others
    assert difference.interval.low <= difference.mean <= difference.interval.high


def test_five_seeds_have_an_interval_over_runs():
    seeds = range(5)
    row = {seed: [fold([1, 1, 1, seed % 2], "a")] for seed in seeds}
    baseline = {seed: [fold([1, 0, 1, 0], "a")] for seed in seeds}
    difference = row_findings("row", row, baseline, None).difference
    assert difference.seeds == 5
    assert difference.interval_over_runs.low <= difference.mean == pytest.approx((1 + 0.4) / 4)


def test_the_baseline_has_no_difference():
    found = row_findings("BT", BASELINE, None, None)
    assert found.difference is None
    assert found.accuracies == (0.4, 0.4, 1.0)


def test_which_length_a_row_prefers():
    # Chosen is shorter and won, longer and won, longer and lost, as long (which says nothing), shorter and tied.
    outcomes = {0: [fold([1, 1, 0, 1, -1], "a", [5, 15, 15, 10, 5])]}
    assert row_findings("row", outcomes, None, None).prefers_shorter == pytest.approx(2 / 4)


def test_length_alone_is_told_by_the_other_folds_which_way():
    folds = [fold([0] * 4, "a", [5, 5, 5, 15]), fold([0] * 2, "b", [15, 15]), fold([0] * 2, "c", [5, 15])]
    prefers = [length_preference(folds, index) for index in range(3)]
    assert prefers == ["longer", "shorter", "shorter"]
    assert length_accuracy(folds, prefers) == pytest.approx((1 + 0 + 1) / 8)
    assert np.concatenate([f.length_won("shorter") for f in folds]).sum() == 4
