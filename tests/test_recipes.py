"""The paper's ablations: every row of its grids is a run, and differs from Id-RM in what its name says alone."""

from pathlib import Path

import pytest
import yaml

from idrm.arguments import paired_layers, parse_arguments

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
GRIDS = sorted(PAPER.glob("*.yaml"))
# By file, the flags in which it differs from idrm.yaml.
ABLATIONS = {
    "deberta-untuned": {"teacher_name_or_path"},
    "bert": {"teacher_name_or_path"},
    "bert-untuned": {"teacher_name_or_path"},
    "without-intra": {"intra_weight"},
    "without-inter": {"inter_weight"},
    # What a teacher reads is no setting of a run without one.
    "bradley-terry": {"teacher_name_or_path", "alpha", "top_blocks", "teacher_max_length", "teacher_dtype"},
}


def recorded(name):
    values = parse_arguments(["--config", str(PAPER / "table-3" / f"{name}.yaml"), "--output_dir", "out"]).recorded
    return {key: value for key, value in values.items() if value is not None}


def grid_rows(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_ablates_and_nothing_else(name):
    idrm, ablation = recorded("idrm"), recorded(name)
    changed = {key for key in idrm.keys() | ablation.keys() if idrm.get(key) != ablation.get(key)}
    assert changed == ABLATIONS[name]


def test_ablations_are_those_of_the_table():
    assert {path.stem for path in (PAPER / "table-3").glob("*.yaml")} == {"idrm", *ABLATIONS}
    configs = [row["config"] for row in grid_rows(PAPER / "table-3.yaml")]
    assert sorted(configs) == sorted(f"table-3/{name}.yaml" for name in ("idrm", *ABLATIONS))
    assert recorded("without-intra")["intra_weight"] == recorded("without-inter")["inter_weight"] == 0
    assert recorded("bradley-terry")["alpha"] == 0


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_rows_of_a_grid_are_runs_of_their_own(path):
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert grid.keys() <= {"title", "benchmarks", "seeds", "baseline", "rows"}
    assert all(row.keys() <= {"name", "config", "overrides", "paper"} for row in grid["rows"])
    names = [row["name"] for row in grid["rows"]]
    assert len(set(names)) == len(names)
    assert grid.get("baseline", names[0]) in names
    runs = []
    for row in grid["rows"]:
        flags = [f"--{flag}={value}" for flag, value in row.get("overrides", {}).items()]
        config = parse_arguments(["--config", str(path.parent / row["config"]), *flags, "--output_dir", "out"])
        assert config.model.model_name_or_path
        assert config.data.dataset_name
        runs.append(config.recorded)
    assert all(runs.count(run) == 1 for run in runs)


def test_the_curves_of_figure_5_share_one_point():
    points = []
    for row in grid_rows(PAPER / "figure-5.yaml"):
        flags = [f"--{flag}={value}" for flag, value in row.get("overrides", {}).items()]
        interaction = parse_arguments(["--config", str(PAPER / row["config"]), *flags]).interaction
        points.append((interaction.alpha, len(paired_layers(interaction)[0])))
    assert points == [(0.2, 1), (0.4, 1), (0.6, 1), (0.8, 1), (1.0, 1), (1.0, 2), (1.0, 3), (1.0, 4)]
