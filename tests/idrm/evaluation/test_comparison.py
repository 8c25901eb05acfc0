"""Two sides on the same items: differences, tests, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from idrm.errors import InputError
from idrm.evaluation.comparison import compare, read_side
from idrm.evaluation.comparison_command import main
from idrm.evaluation.outcomes import write_outcomes
from idrm.evaluation.statistics import mcnemar, paired_difference, wilcoxon


@pytest.fixture
def runs(tmp_path, make_outcomes):
    """runs(name, accuracy, seeds): folders of outcomes of 200 items in four subsets, a seed each."""

    def make(name, accuracy, seeds, **extra):
        folders = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, len(name)])
            margins = np.where(rng.random(200) < accuracy, 1.0, -1.0)
            subsets = [f"s{index % 4}" for index in range(200)]
            outcomes = make_outcomes(margins, model=name, subsets=subsets, **extra)
            folders.append(str(tmp_path / f"{name}-{seed}"))
            write_outcomes(tmp_path / f"{name}-{seed}" / f"{outcomes.benchmark}.jsonl", outcomes)
        return folders

    return make


def test_one_run_against_another(runs):
    a, b = read_side(runs("better", 0.8, 1)), read_side(runs("bad", 0.55, 1))
    (comparison,) = compare(a, b)
    ours, theirs = a.outcomes["held-out"][0], b.outcomes["held-out"][0]
    expected = paired_difference(ours.won, theirs.won, ours.prompt)
    assert (comparison.difference, comparison.interval) == expected
    assert comparison.difference == pytest.approx(ours.won.mean() - theirs.won.mean())
    assert comparison.mcnemar == [mcnemar(ours.won, theirs.won)]
    assert comparison.interval.low > 0
    assert comparison.mcnemar[0] < 0.05
    assert comparison.wilcoxon_over_seeds is None
    by_subset = [[side.won[side.subset == f"s{n}"].mean() for n in range(4)] for side in (ours, theirs)]
    assert comparison.wilcoxon_over_subsets == wilcoxon(*by_subset)
    assert (comparison.items, comparison.prompts, comparison.seeds, comparison.subsets) == (200, 100, 1, 4)
    (other_way,) = compare(b, a)
    assert other_way.difference == pytest.approx(-comparison.difference)


def test_several_seeds_are_paired_in_order(runs):
    a, b = read_side(runs("better", 0.8, 3)), read_side(runs("bad", 0.55, 3))
    (comparison,) = compare(a, b)
    assert comparison.seeds == len(comparison.mcnemar) == len(comparison.first) == 3
    assert comparison.wilcoxon_over_seeds == 0.25
    assert comparison.as_dict()["lowest_wilcoxon_over_seeds"] == 0.25
    assert comparison.difference == pytest.approx(np.mean(comparison.first) - np.mean(comparison.second))
    wide, narrow = comparison.interval_over_seeds, comparison.interval
    assert wide.high - wide.low > narrow.high - narrow.low
    for index, (ours, theirs) in enumerate(zip(a.outcomes["held-out"], b.outcomes["held-out"], strict=True)):
        assert comparison.mcnemar[index] == mcnemar(ours.won, theirs.won)


def test_other_items_and_other_numbers_of_runs_are_refused(tmp_path, runs, make_outcomes):
    a, b = runs("better", 0.8, 2), runs("bad", 0.55, 2)
    with pytest.raises(InputError, match="expected as many runs on both sides"):
        compare(read_side(a), read_side(b[:1]))
    write_outcomes(tmp_path / "short" / "held-out.jsonl", make_outcomes([1.0] * 10))
    with pytest.raises(InputError, match="hold different items of held-out, 200 and 10"):
        compare(read_side(a[:1]), read_side([str(tmp_path / "short")]))
    with pytest.raises(InputError, match="hold different items of held-out, 200 and 10"):
        read_side([a[0], str(tmp_path / "short")])
    other = runs("other", 0.5, 1, benchmark="elsewhere")
    with pytest.raises(InputError, match="share no benchmark: held-out and elsewhere"):
        compare(read_side(a[:1]), read_side(other))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no outcomes; expected a file of `idrm eval`"):
        read_side([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="no such file or folder"):
        read_side([str(tmp_path / "nowhere")])


def test_scores_are_those_of_the_benchmark(tmp_path, make_outcomes):
    subsets = ["math-prm"] * 4 + ["hep-go"] * 4
    sides = []
    for name, margins in (("a", [1, 1, 1, 1, -1, -1, -1, -1]), ("b", [-1, -1, -1, 1, 1, 1, 1, 1])):
        outcomes = make_outcomes(margins, model=name, benchmark="rewardbench", subsets=subsets)
        outcomes = dataclasses.replace(outcomes, origin={"kind": "rewardbench"})
        write_outcomes(tmp_path / f"{name}.jsonl", outcomes)
        sides.append(read_side([str(tmp_path / f"{name}.jsonl")]))
    by_score = {comparison.score: comparison for comparison in compare(*sides)}
    assert list(by_score) == ["Reasoning", "Leaderboard"]
    # math-prm weighs 984 and hep-go 164.
    assert by_score["Reasoning"].difference == pytest.approx((984 * 0.75 - 164 * 1.0) / (984 + 164))
    assert by_score["Reasoning"].first == pytest.approx([984 / (984 + 164)])


def test_the_command_prints_and_writes(tmp_path, runs, capsys):
    a, b = runs("better", 0.8, 2), runs("bad", 0.55, 2)
    folder = tmp_path / "out"
    main(["--first", *a, "--second", *b, "--second_name", "baseline", "--output_dir", str(folder)])
    printed = capsys.readouterr().out
    assert "A = better, B = baseline" in printed
    assert "Of 2 seeds, Wilcoxon's p-value cannot be below 0.5" in printed
    written = json.loads((folder / "comparison.json").read_text())
    (comparison,) = written["comparisons"]
    assert comparison["wilcoxon_over_seeds"] == comparison["lowest_wilcoxon_over_seeds"] == 0.5
    assert comparison["interval"][0] <= comparison["difference"] <= comparison["interval"][1]
    text = (folder / "comparison.md").read_text()
    assert f"{100 * comparison['difference']:+.2f} [" in text
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md"]
    main([a[0], b[0], "--output_dir", str(folder)])  # over an earlier one
    assert json.loads((folder / "comparison.json").read_text())["second"]["label"] == "bad"


@pytest.mark.parametrize(
    "flags",
    [["a"], ["a", "b", "c"], ["--first", "a"], ["a", "b", "--first", "a", "--second", "b"], ["a", "--bogus"], []],
)
def test_other_command_lines_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
