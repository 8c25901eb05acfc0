"""The average of the paper's six columns."""

import pytest

from idrm.evaluation.benchmark import Benchmark, Part, Score
from idrm.evaluation.paper_average import AVERAGE, COLUMNS, paper_average, paper_scores
from idrm.evaluation.rewardbench import scores_of as rewardbench_scores
from idrm.evaluation.rmb import GOALS
from idrm.evaluation.rmb import scores_of as rmb_scores


def test_it_is_plain_and_tells_the_two_printed_values_apart():
    # What is known of the paper's Id-RM row: its printed RMB Helpful, 57.11, does not fit its average, and 58.12 does.
    # Averages are printed to two digits; the two values lie sixteen units of the last one apart.
    others = dict.fromkeys(COLUMNS[1:], 80.0)
    printed, fitting = (paper_average({"RMB Helpful": value, **others}) for value in (57.11, 58.12))
    assert fitting - printed == pytest.approx((58.12 - 57.11) / 6)
    assert round(fitting, 2) - round(printed, 2) == pytest.approx(0.17, abs=0.011)
    assert paper_average(dict(zip(COLUMNS, [10, 20, 30, 40, 50, 60], strict=True))) == 35
    with pytest.raises(KeyError):
        paper_average(others)


def test_it_takes_sections_and_goals_alike_however_many_items_they_have():
    subsets = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-go")
    counts = {f"{folder}/{goal}": 4 for folder in ("Pairwise_set", "BoN_set") for goal in GOALS}
    benchmarks = [
        Benchmark("rmb", "rmb", "", "", [], rmb_scores(counts)),
        Benchmark("rewardbench", "rewardbench", "", "", [], rewardbench_scores(subsets)),
    ]
    scores = paper_scores(benchmarks)
    assert [score.name for score in scores] == [*COLUMNS, AVERAGE]
    accuracies = {
        "rmb: Pairwise_set/Helpfulness": 0.1,
        "rmb: BoN_set/Helpfulness": 0.3,
        "rmb: Pairwise_set/Harmlessness": 0.4,
        "rmb: BoN_set/Harmlessness": 0.6,
        "rewardbench: alpacaeval-easy": 0.9,
        "rewardbench: mt-bench-hard": 0.5,
        "rewardbench: donotanswer": 0.7,
        "rewardbench: math-prm": 0.8,
        "rewardbench: hep-go": 0.2,
    }
    columns = {score.name: score.of(accuracies) for score in scores}
    assert columns["RMB Helpful"] == pytest.approx(0.2)
    assert columns["RewardBench Reasoning"] == pytest.approx((984 * 0.8 + 164 * 0.2) / (984 + 164))
    assert columns[AVERAGE] == pytest.approx(paper_average(columns))


def test_without_one_of_the_benchmarks_or_sections_there_is_none():
    counts = {f"BoN_set/{goal}": 4 for goal in GOALS}
    rmb = Benchmark("rmb", "rmb", "", "", [], rmb_scores(counts))
    pairs = Benchmark("pairs", "pairs", "", "", [], [Score("Accuracy", (Part("pairs", 1.0, ("pairs",)),))])
    part = Benchmark("rewardbench", "rewardbench", "", "", [], rewardbench_scores(["hep-go"]))
    assert paper_scores([rmb, pairs]) == []
    assert paper_scores([rmb, part]) == []
