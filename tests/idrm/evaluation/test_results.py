"""From outcomes to reported numbers: weights, intervals, ties, and what length alone gets."""

import json

import numpy as np
import pytest

from idrm.evaluation.benchmark import Benchmark, Part, Score
from idrm.evaluation.outcomes import Outcome, Outcomes
from idrm.evaluation.report import markdown, write_files
from idrm.evaluation.results import result_of, tables_of
from idrm.evaluation.statistics import bootstrap_interval


def test_a_result_weighs_everything_as_the_score_does(make_outcomes):
    margins = [1, 1, 1, 0, -1, 1, 0, 0, -1, -1]
    subsets = ["a"] * 6 + ["b"] * 4
    outcomes = make_outcomes(margins, subsets=[*subsets])
    score = Score("mean", (Part("a", 3.0, ("a",)), Part("b", 1.0, ("b",))))
    result = result_of(score, outcomes)
    assert result.accuracy == pytest.approx(0.75 * 4 / 6 + 0.25 * 0)
    assert result.ties == pytest.approx(0.75 * 1 / 6 + 0.25 * 2 / 4)
    assert (result.items, result.prompts, result.unread) == (10, 5, 0)
    # Chosen lengths are 10, 11, 12 in turn, rejected ones 11.
    assert result.length_only["shorter"] == pytest.approx(0.75 * 2 / 6 + 0.25 * 2 / 4)
    assert result.length_only["longer"] == pytest.approx(0.75 * 2 / 6 + 0.25 * 1 / 4)
    assert result.better_length == ("shorter", result.length_only["shorter"])
    expected = bootstrap_interval(outcomes.won, outcomes.prompt, strata=subsets, weights={"a": 3.0, "b": 1.0})
    assert result.interval == expected
    only_b = result_of(Score("b", (Part("b", 1.0, ("b",)),)), outcomes)
    assert (only_b.accuracy, only_b.ties, only_b.items) == (0, 0.5, 4)


def test_the_interval_draws_prompts_and_not_items(make_outcomes):
    # Two items of a prompt decide alike, so that there are half as many independent ones.
    outcomes = make_outcomes(np.repeat(np.where(np.random.default_rng(0).random(100) < 0.5, 1, -1), 2))
    low, high = result_of(Score("all", (Part("all", 1.0, ("pairs",)),)), outcomes).interval
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


@pytest.fixture
def both(make_outcomes):
    """A table of two models, of which one cannot read an item."""
    score = Score("Accuracy", (Part("held-out", 1.0, ("pairs",)),))
    detail = Score("pairs", (Part("pairs", 1.0, ("pairs",)),), is_detail=True)
    benchmark = Benchmark("held-out", "pairs", "pairs.jsonl", "4 pairs", [], [score, detail], ["a note"])
    first = make_outcomes([1, 1, 0, -1], model="A")
    second = make_outcomes([1, -1, -1, -1], model="B")
    unread = Outcome("item 3", "pairs", "prompt 1", float("nan"), (float("nan"),), 0, (0,))
    second = Outcomes("B", "held-out", [*second.items[:3], unread])
    return tables_of([benchmark], [first, second])


def test_models_stand_side_by_side(tmp_path, both):
    models = {"A": "folder/a", "B": "folder/b"}
    text = markdown(both, models, 0.95)
    rows = [line for line in text.splitlines() if line.startswith("| Accuracy")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:2] == ["Accuracy", "4"]
    assert cells[2].startswith("50.00 [")
    assert cells[3] == "25.00"
    assert cells[5].startswith("25.00 [")
    assert cells[6] == "0.00"
    assert "B cannot read 1 items, which count as lost." in text
    assert "`folder/a`" in text
    write_files(tmp_path, both, models, {"dtype": "float32"}, 0.95)
    written = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "evaluation.md").read_text() == text
    scores = written["tables"][0]["scores"]
    assert scores[0]["models"]["A"]["accuracy"] == 0.5
    assert scores[0]["models"]["B"]["unread"] == 1
    assert set(scores[0]["models"]["A"]["length_only"]) == {"shorter", "longer"}
    assert written["models"] == models
