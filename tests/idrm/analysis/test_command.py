"""`idrm analyze` from flags to files: what is written, and what is refused in one line with nothing written."""

import csv
import json
import os
import shutil

import matplotlib.image
import numpy as np
import pytest
import yaml

from idrm.analysis import attention_by_stage, find_runs, interaction_scores
from idrm.analysis.command import main
from idrm.analysis.interaction_scores import EXAMPLE
from idrm.evaluation.command import main as evaluate
from idrm.evaluation.reward_model import load_reward_model


@pytest.fixture
def analyze(tmp_path):
    """analyze(*flags): runs the command into a folder and returns it."""

    def run(*flags):
        main([*map(str, flags), "--output_dir", str(tmp_path / "out")])
        return tmp_path / "out"

    return run


@pytest.fixture
def refused(tmp_path, capsys, analyze):
    """refused(*flags): the one line that the command ends with, having written nothing."""

    def run(*flags):
        with pytest.raises(SystemExit) as ended:
            analyze(*flags)
        assert ended.value.code == 2
        assert not (tmp_path / "out").exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def require_picture(path):
    """A PNG that shows something."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels[::2, ::2, :3].reshape(-1, 3), axis=0)) > 10


def test_attention(analyze, student_path, eval_pairs_path, pairs, capsys):
    flags = ("--dataset_name", eval_pairs_path, "--device", "cpu", "--max_pairs", 6, "--stages", 4, "--batch_size", 2)
    folder = analyze("attention", student_path, *flags)
    assert sorted(os.listdir(folder)) == ["attention.csv", "attention.png", "masked_accuracy.csv"]
    reward_model = load_reward_model(str(student_path), device="cpu")
    analysis = attention_by_stage(reward_model, [pairs[index] for index in (0, 1, 3, 5, 7, 9)], stages=4)
    masked = rows_of(folder / "masked_accuracy.csv")
    assert [float(row["accuracy"]) for row in masked] == analysis.won.mean(axis=1).tolist()
    assert [float(row["masked_percent"]) for row in masked] == [0.0, 25.0, 50.0, 75.0]
    right = analysis.won[0]
    for row in rows_of(folder / "attention.csv"):
        chosen = right if row["decision"] == "right" else ~right
        side = ("chosen", "rejected").index(row["sequence"])
        expected = analysis.attention[chosen, side, int(row["stage"]) - 1].mean()
        assert float(row["attention"]) == pytest.approx(expected, abs=1e-5)
    require_picture(folder / "attention.png")
    assert "stage" in capsys.readouterr().out


def test_interaction_of_the_example_and_of_texts(analyze, load, with_template, make_pair):
    model = with_template()
    folder = analyze(
        "interaction", model, "--dtype", "float64", "--device", "cpu", "--layer", -2, "--queries", "rejected"
    )
    assert sorted(os.listdir(folder)) == ["interaction.csv", "interaction.html", "interaction.png"]
    pair = make_pair(*(EXAMPLE[name] for name in ("prompt", "chosen", "rejected")))
    expected = interaction_scores(load(model), pair, layer=-2, queries="rejected")
    rows = rows_of(folder / "interaction.csv")
    assert [float(row["score"]) for row in rows] == pytest.approx(expected.scores.ravel().tolist(), abs=1e-12)
    assert [row["key_token"] for row in rows[: len(expected.columns.texts)]] == expected.columns.texts
    require_picture(folder / "interaction.png")
    page = (folder / "interaction.html").read_text(encoding="utf-8")
    assert page.count("<td") == len(rows)
    assert "queries of rejected" in page

    folder = analyze(
        "interaction", model, "--device", "cpu", "--chosen", "green, <b>日本</b>", "--rejected", '"blue" 5 %$\\x'
    )
    rows = rows_of(folder / "interaction.csv")
    queries = {row["query"]: row["query_token"] for row in rows}
    # A character of several byte-level tokens stands at each of them.
    assert "".join(queries.values()).replace("日日日", "日").replace("本本本", "本") == "green,<b>日本</b>"
    assert "<b>" not in (folder / "interaction.html").read_text(encoding="utf-8")


def test_sensitivity(analyze, tmp_path):
    for alpha, blocks, seed, accuracy in ((0.0, None, 1, 0.5), (0.5, 1, 1, 0.6), (1.0, 1, 2, 0.7), (1.0, 3, 1, 0.55)):
        folder = tmp_path / "runs" / f"{alpha}-{blocks}"
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(yaml.safe_dump({"alpha": alpha, "top_blocks": blocks, "seed": seed}))
        (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    folder = analyze("sensitivity", tmp_path / "runs")
    assert sorted(os.listdir(folder)) == ["runs.csv", "sensitivity.csv", "sensitivity.png"]
    points = [(row["alpha"], row["top_blocks"], row["mean"]) for row in rows_of(folder / "sensitivity.csv")]
    assert points == [("0.0", "", "0.5"), ("0.5", "1", "0.6"), ("1.0", "1", "0.7"), ("1.0", "3", "0.55")]
    assert [row["seed"] for row in rows_of(folder / "runs.csv")] == ["1", "1", "2", "1"]
    require_picture(folder / "sensitivity.png")


def test_outcomes_of_idrm_eval_are_those_of_the_run_that_it_evaluated(student_path, eval_pairs_path, pairs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(student_path, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump({"alpha": 0.5, "seed": 3}))
    results = tmp_path / "results"
    flags = ("--benchmark", f"held-out={eval_pairs_path}", "--output_dir", results, "--device", "cpu")
    evaluate([str(folder), *map(str, flags)])
    (run,) = find_runs(results.rglob("held-out.jsonl"))
    won = attention_by_stage(load_reward_model(str(folder), device="cpu"), pairs, stages=1).won
    assert (run.folder, run.alpha, run.top_blocks, run.seed) == (folder.resolve(), 0.5, 1, 3)
    assert run.accuracy == won.mean()


def test_refusals(refused, student_path, teacher_path, eval_pairs_path, tmp_path):
    data = ("--dataset_name", eval_pairs_path)
    assert "no such folder" in refused("attention", tmp_path / "none", *data)
    assert "no such file or folder" in refused("attention", student_path, "--dataset_name", "none.jsonl")
    assert "is a classifier of 3 labels" in refused("attention", teacher_path, *data)
    assert "layer 9 is beyond the model's depth" in refused("attention", student_path, *data, "--layer", 9)
    assert "--device abacus: is not there" in refused("attention", student_path, *data, "--device", "abacus")
    assert "--max_pairs: expected at least 1, got 0" in refused("attention", student_path, *data, "--max_pairs", 0)
    assert "the following arguments are required: --dataset_name" in refused("attention", student_path)
    assert "invalid choice: 'attentoin'" in refused("attentoin", student_path)
    assert "expected both --chosen and --rejected" in refused("interaction", student_path, "--chosen", "a")
    same = ("--prompt", "a", "--chosen", "b", "--rejected", "b ")
    assert "--chosen, --rejected: identical responses" in refused("interaction", student_path, *same)
    assert "no such file or folder" in refused("sensitivity", tmp_path / "none")


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["interaction", str(tmp_path / "none"), "--output_dir", str(tmp_path / "file" / "out")])
    assert ended.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
