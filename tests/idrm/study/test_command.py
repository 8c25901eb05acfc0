"""`idrm study` from pairs to its table, on tiny models; training in this process instead of one of its own."""

import json

import pytest
import yaml

from idrm import train
from idrm.study import command
from idrm.study.preparation import Places
from idrm.study.recipe import read_recipe


@pytest.fixture
def trained(monkeypatch):
    """Trains in this process, and returns the folders of the runs that were trained."""
    seen = []

    def train_here(runs, *, log_folder, jobs, inherited):
        for run in runs:
            if not run.is_finished:
                seen.append(run.folder)
                train.main([*run.tokens, "--disable_tqdm", "true", "--use_cpu", "true"])

    monkeypatch.setattr(command, "train_runs", train_here)
    return seen


@pytest.fixture
def recipe(tmp_path):
    content = {
        "title": "A study",
        "folds": 2,
        "student": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 300},
        "teacher": "teacher.yaml",
        "seeds": [0],
        "training": {
            "teacher_name_or_path": "{tuned_teacher}",
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "baseline": "BT-RM",
        "rows": [
            {"name": "BT-RM", "overrides": {"alpha": 0, "teacher_name_or_path": None}},
            {"name": "untuned", "overrides": {"teacher_name_or_path": "{untuned_teacher}"}},
        ],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_pair_is_tested_by_runs_that_have_not_seen_it(
    tmp_path, recipe, trained, teacher_path, eval_pairs_path, capsys
):
    lines = eval_pairs_path.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    # Training drops an empty response; the study tests it all the same.
    first["rejected"] = first["rejected"].partition("\n\nAssistant:")[0] + "\n\nAssistant:"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(first) + "\n" + "".join(lines[1:]))
    folder = tmp_path / "out"
    flags = f"--dataset_name {pairs} --encoder_name_or_path {teacher_path} --teacher_name_or_path {teacher_path}"
    flags += f" --recipe {recipe} --output_dir {folder} --jobs 2"
    command.main(flags.split())
    assert [path.relative_to(folder / "runs").as_posix() for path in trained] == [
        *("fold_0/bt-rm/seed_0", "fold_1/bt-rm/seed_0"),
        *("fold_0/untuned/seed_0", "fold_1/untuned/seed_0"),
    ]
    places = Places(folder)
    tested = [json.loads(line) for fold in (0, 1) for line in (places.fold(fold) / "test.jsonl").open()]
    assert sorted(map(json.dumps, tested)) == sorted(json.dumps(json.loads(line)) for line in pairs.open())
    for fold in (0, 1):
        held_out, training = ((places.fold(fold) / f"{name}.jsonl").read_text() for name in ("test", "train"))
        assert set(held_out.splitlines()).isdisjoint(training.splitlines())
    found = json.loads((folder / "study.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["BT-RM", "untuned"]
    assert all(row["pairs"] == len(lines) for row in found["rows"])
    assert 0 < found["length_accuracy"] < 1
    assert found["rows"][0]["interaction_ratio"] is None
    assert found["rows"][1]["interaction_ratio"] > 0
    assert found["rows"][1]["difference"]["seeds"] == 1
    assert "| untuned | 1 |" in (folder / "study.md").read_text()
    assert "A study" in capsys.readouterr().out

    command.main(flags.split())
    assert len(trained) == 4
    assert json.loads((folder / "study.json").read_text())["rows"] == found["rows"]

    pairs.write_text("".join(lines[1:]))
    with pytest.raises(SystemExit):
        command.main(flags.split())
    assert "holds other pairs than --dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--dataset_name: a study needs it"),
        ("--dataset_name PAIRS --encoder_name_or_path TEACHER", "--nli_dataset_name: a study needs it"),
        ("--dataset_name PAIRS --encoder_name_or_path /no/folder --nli_dataset_name n", "/no/folder: no such folder"),
        ("--dataset_name /no.jsonl --encoder_name_or_path TEACHER --nli_dataset_name n", "/no.jsonl: no such file"),
        ("--dataset_name PAIRS --encoder_name_or_path TEACHER --nli_dataset_name n --jobs 0", "--jobs: expected at"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, recipe, trained, teacher_path, eval_pairs_path, capsys, flags, message):
    flags = flags.replace("PAIRS", str(eval_pairs_path)).replace("TEACHER", str(teacher_path)).split()
    with pytest.raises(SystemExit) as ending:
        command.main([*flags, "--recipe", str(recipe), "--output_dir", str(tmp_path / "out")])
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_document_is_a_study():
    recipe = read_recipe(command.RECIPE)
    assert recipe.folds == 5
    assert recipe.teacher.is_file()
    seeds = {row.name: len(row.seeds) for row in recipe.grid.rows}
    assert min(seeds["BT-RM"], seeds["Id-RM"]) >= 5
    assert min(seeds.values()) >= 2
    assert {"without intra", "without inter", "untuned teacher", "block -2", "uniform maps"} <= seeds.keys()
