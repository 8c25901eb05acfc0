"""Grid files: what they mean, and every way to get one wrong."""

from pathlib import Path

import pytest

from idrm.errors import InputError
from idrm.grid.specification import read_grid

GRID = """
title: A table
benchmarks: {hh: pairs.jsonl}
seeds: [0, 1]
training: {learning_rate: 0.1, teacher_name_or_path: t}
baseline: BT-RM
rows:
  - name: BT-RM
    overrides: {alpha: 0, teacher_name_or_path: null}
  - name: "block -2"
    config: runs/idrm.yaml
    overrides: {student_layers: [-2]}
    seeds: [3]
    paper: {Chat: 61.5}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return write


def test_rows_take_what_the_grid_says_and_give_back_what_they_do_not_want(write, tmp_path):
    grid = read_grid(write(GRID))
    first, second = grid.rows
    assert (grid.title, grid.baseline, grid.benchmarks) == ("A table", "BT-RM", {"hh": "pairs.jsonl"})
    assert first.flags == {"learning_rate": 0.1, "alpha": 0}
    assert first.seeds == (0, 1)
    assert second.flags == {
        "config": tmp_path / "runs" / "idrm.yaml",
        "learning_rate": 0.1,
        "teacher_name_or_path": "t",
        "student_layers": [-2],
    }
    assert (second.slug, second.seeds, second.paper) == ("block-2", (3,), {"Chat": 61.5})
    run = second.run(tmp_path / "runs", 3, {"model_name_or_path": "m"})
    assert run.folder == tmp_path / "runs" / "block-2" / "seed_3"
    assert run.tokens[-2:] == ["--seed=3", f"--output_dir={run.folder}"]
    assert "--student_layers" in run.tokens
    assert "--model_name_or_path=m" in run.tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [", r"grid\.yaml:\d+: is not valid YAML"),
        ("- a", "expected a mapping, found list"),
        ("title: x", "expected a list of rows, found NoneType"),
        ("rows: []", "expected a list of rows"),
        ("rows: [{overrides: {}}]", "row 1: expected a name"),
        ("rows: [{name: a}]", "row 1: expected seeds"),
        ("seeds: [0, 0]\nrows: [{name: a}]", "seeds: expected a list of different integers"),
        ("seeds: [-1]\nrows: [{name: a}]", "seeds: expected a list of different integers"),
        ("seeds: [0]\nrows: [{name: a, alpha: 1}]", "row 1: unknown key 'alpha'; expected one of name, config"),
        ("seeds: [0]\nrows: [{name: a}, {name: A}]", "names of their own, found 'a' again"),
        ("seeds: [0]\nrows: [{name: a}]\nbaseline: b", "baseline: expected the name of a row of runs, found 'b'"),
        ("rows: [{name: a, model: m}]\nbaseline: a", "baseline: expected the name of a row of runs, found 'a'"),
        ("rows: [{name: a, model: m, seeds: [0]}]", "row 1: model: expected .* alone, found seeds beside it"),
        ("rows: [{name: a, model: [m]}]", r"row 1: model: expected a model's folder or hub name alone, found \['m'\]"),
        ("rows: [{name: a, model: '{warm}/x'}]", r"grid\.yaml: \{warm\} has no value: give it by --values warm="),
        ("seeds: [0]\nrows: [{name: a, paper: {x: '57'}}]", "paper: expected a number for 'x', found '57'"),
        ("seeds: [0]\ntraining: {seed: 1}\nrows: [{name: a}]", "training: seed: is the grid's to give"),
        ("seeds: [0]\nrows: [{name: a, overrides: {output_dir: x}}]", "row 1: overrides: output_dir: is the grid's"),
        ("seed: [0]\nrows: [{name: a}]", "unknown key 'seed'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(write, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        read_grid(write(text))
    assert "\n" not in str(refusal.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")


def test_names_in_braces_are_filled_and_a_row_may_be_a_model(write):
    text = """
benchmarks: {hh: "{pairs}"}
seeds: [0]
training: {deepspeed: '{"zero_optimization": {"stage": 3}}'}
rows:
  - {name: AM-RM, overrides: {dataset_name: "{margins}/train.jsonl", student_layers: [-2]}}
  - {name: WARM, model: "{warm}", paper: {hh: 60}}
"""
    grid = read_grid(write(text), seeds=[4, 5], values={"pairs": "p.jsonl", "margins": "{warm}", "warm": "averaged"})
    trained, model = grid.rows
    assert grid.benchmarks == {"hh": "p.jsonl"}
    # A value is put in as it is, and what JSON has in braces is no name.
    assert trained.flags["dataset_name"] == "{warm}/train.jsonl"
    assert trained.flags["deepspeed"] == '{"zero_optimization": {"stage": 3}}'
    assert (trained.seeds, trained.model) == ((4, 5), None)
    assert (model.seeds, model.model, model.flags) == ((), "averaged", {})
