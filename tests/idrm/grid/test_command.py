"""`idrm grid` from a file to its table, on tiny models; training in this process instead of one of its own."""

import json
import subprocess
import sys

import pytest
import yaml

from idrm import train
from idrm.evaluation.outcomes import read_outcomes
from idrm.grid import command
from idrm.run_folder import sole_use


@pytest.fixture
def trained(monkeypatch):
    """Trains in this process, and returns the runs that were trained."""
    seen = []

    def train_here(runs, *, log_folder, launcher, jobs, inherited):
        for run in runs:
            if not run.is_finished:
                seen.append((run.row, run.seed))
                train.main(run.tokens)

    monkeypatch.setattr(command, "train_runs", train_here)
    return seen


@pytest.fixture
def grid_file(tmp_path, student_path, teacher_path, pairs_path, eval_pairs_path):
    training = {
        "model_name_or_path": str(student_path),
        "teacher_name_or_path": str(teacher_path),
        "dataset_name": str(pairs_path),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    content = {
        "title": "A table",
        "benchmarks": {"held-out": str(eval_pairs_path)},
        "seeds": [0, 1],
        "training": training,
        "baseline": "BT-RM",
        "rows": [
            {"name": "BT-RM", "overrides": {"alpha": 0, "teacher_name_or_path": None}, "paper": {"held-out": 61.25}},
            {"name": "Id-RM"},
        ],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_grid_is_trained_evaluated_and_put_into_a_table_once(tmp_path, grid_file, trained, capsys):
    folder = tmp_path / "out"
    flags = [str(grid_file), "--output_dir", str(folder), "--", "--per_device_train_batch_size", "4"]
    command.main(flags)
    assert trained == [("BT-RM", 0), ("BT-RM", 1), ("Id-RM", 0), ("Id-RM", 1)]
    table = json.loads((folder / "grid.json").read_text())
    outcomes = {
        row: [read_outcomes(folder / f"outcomes/{row}/seed_{seed}/held-out.jsonl").won.mean() * 100 for seed in (0, 1)]
        for row in ("bt-rm", "id-rm")
    }
    baseline, row = (table["rows"][name]["scores"]["held-out"] for name in ("BT-RM", "Id-RM"))
    assert baseline["values"] == pytest.approx(outcomes["bt-rm"])
    assert row["values"] == pytest.approx(outcomes["id-rm"])
    assert row["difference"] == pytest.approx(sum(outcomes["id-rm"]) / 2 - sum(outcomes["bt-rm"]) / 2)
    assert (baseline["difference"], baseline["paper"]) == (None, 61.25)
    text = (folder / "grid.md").read_text()
    assert "| BT-RM, as the paper printed it | 61.25 |" in text
    assert "digest" in text  # of the items
    assert "A table" in capsys.readouterr().out
    arguments = yaml.safe_load((folder / "runs/id-rm/seed_1/run.yaml").read_text())
    assert arguments["per_device_train_batch_size"] == 4

    command.main(flags)
    assert len(trained) == 4
    assert json.loads((folder / "grid.json").read_text()) == table


def test_what_would_fail_later_is_refused_before_training(tmp_path, grid_file, trained, capsys):
    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit) as ending:
            command.main([str(grid_file), "--output_dir", str(tmp_path / "out"), *flags])
        assert ending.value.code == 2
        # Behind the progress of reading a benchmark, where it came so far.
        return capsys.readouterr().err.splitlines()[-1]

    assert "--alpha -1" in refused("--", "--alpha", "-1") or trained == []
    assert "unrecognized arguments: --no_flag" in refused("--", "--no_flag", "1")
    assert "--seeds: expected a list of different integers" in refused("--seeds", "0", "0")
    assert "--jobs: expected at least 1" in refused("--jobs", "0")
    assert "behind --: seed: is the grid's to give" in refused("--", "--seed", "3")
    assert "invalid choice: 'bogus'" in refused("--eval_dtype", "bogus")
    assert "--values warm: " in refused("--values", "warm=x")
    assert "--launcher no-such-program -n 2: expected a program" in refused("--launcher", "no-such-program -n 2")
    text = yaml.safe_load(grid_file.read_text())
    text["rows"][0]["paper"] = {"Chat": 61.25}
    grid_file.write_text(yaml.safe_dump(text))
    assert "row 'BT-RM': paper: no column 'Chat'; expected one of held-out" in refused()
    text["benchmarks"] = {"held-out": "/nowhere/pairs.jsonl"}
    grid_file.write_text(yaml.safe_dump(text))
    assert "/nowhere/pairs.jsonl: no such file or folder" in refused()
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_one_command_at_a_time_is_at_work_in_a_folder(tmp_path, grid_file, trained, capsys):
    with sole_use("--output_dir", tmp_path / "out") as held:
        # A run that outlives its command holds the folder still.
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held])
    for _ in range(2):
        with pytest.raises(SystemExit) as ending:
            command.main([str(grid_file), "--output_dir", str(tmp_path / "out")])
        assert ending.value.code == 2
        assert "another command is at work there" in capsys.readouterr().err
    orphan.communicate(b"\n")
    assert trained == []
    command.main([str(grid_file), "--output_dir", str(tmp_path / "out"), "--seeds", "0"])
    assert len(trained) == 2
