"""The table says what the stages' files say, for one seed and several, and marks what an unfit teacher spoils."""

import json

import pytest
from rich.console import Console

from idrm.embedded.generator import CUE_SHARE_OF_SPLIT, Sizes, write_data
from idrm.embedded.report import RESULTS_FILE, collect, print_report
from idrm.embedded.stages import EVALUATED_SPLITS


def write_run(folder, accuracy_of_model: dict[str, float], dev_accuracy: float):
    """What the stages of one seed leave behind."""
    write_data(folder / "data", seed=0, sizes=Sizes(train=40, evaluation=20, nli_train=3, nli_dev=3))
    (folder / "data" / "train_sample.jsonl").write_bytes((folder / "data" / "train.jsonl").read_bytes())
    (folder / "teacher").mkdir()
    (folder / "teacher" / "nli_results.json").write_text(json.dumps({"dev_accuracy": dev_accuracy, "steps": 5}))
    for model, accuracy in accuracy_of_model.items():
        results = {}
        for split in EVALUATED_SPLITS:
            results |= {f"eval_{split}_accuracy": accuracy, f"eval_{split}_preference_loss": 0.625}
            if model != "bt":
                results |= {f"eval_{split}_interaction_loss": 3.25, f"eval_{split}_interaction_ratio": 0.375}
        (folder / model).mkdir()
        (folder / model / "all_results.json").write_text(json.dumps(results))
    (folder / "finished_stages.json").write_text(json.dumps({"teacher": 60.0, "bt": 30.0}))
    return folder


def printed(folder, runs) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(folder, runs, console)
    return console.export_text()


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_one_seed(tmp_path):
    folder = write_run(tmp_path, {"bt": 0.75, "idrm": 0.875}, dev_accuracy=0.97)
    text = printed(folder, {0: folder})
    assert row_of(text, "Bradley-Terry").count("75.0%") == len(EVALUATED_SPLITS)
    assert row_of(text, "Id-RM").count("87.5%") == len(EVALUATED_SPLITS)
    cue = row_of(text, "surface cue")
    assert [f"{share:.1%}" in cue for share in CUE_SHARE_OF_SPLIT.values()] == [True] * len(CUE_SHARE_OF_SPLIT)
    assert "INVALID" not in text
    assert "uniform maps" not in text
    assert "97.0%, fit; all stages took 1.5 min" in text
    assert str(folder) in text
    assert "--model_name_or_path" in text


def test_an_unfit_teacher_makes_the_distilled_row_invalid_and_no_other(tmp_path):
    folder = write_run(tmp_path, {"bt": 0.75, "idrm": 0.875}, dev_accuracy=0.899)
    text = printed(folder, {0: folder})
    assert "TEACHER UNFIT" in text
    assert "INVALID: teacher unfit" in row_of(text, "Id-RM")
    assert "INVALID" not in row_of(text, "Bradley-Terry")


def test_several_seeds_with_the_control(tmp_path):
    runs = {
        seed: write_run(tmp_path / f"seed_{seed}", {"bt": 0.5 + 0.1 * seed, "idrm": 0.9, "control": 0.6}, 0.99)
        for seed in range(3)
    }
    text = printed(tmp_path, runs)
    assert row_of(text, "Bradley-Terry").count("60.0%") == len(EVALUATED_SPLITS)
    assert "50.0% to 70.0%" in text
    assert "uniform maps" in text
    assert "3 seeds" in text
    saved = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert saved["2"]["accuracy"]["bt"]["neutral"] == pytest.approx(0.7)
    assert saved["1"] == json.loads(json.dumps(collect(runs[1])))
