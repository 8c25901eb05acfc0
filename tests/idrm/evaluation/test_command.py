"""`idrm eval` from a command line to files: labels, refusals, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idrm.errors import InputError
from idrm.evaluation.command import labelled_models, main
from idrm.evaluation.outcomes import read_outcomes

REPOSITORY = Path(__file__).resolve().parents[3]


def test_labels_are_folder_names_made_unique():
    assert labelled_models(["runs/a/model", "runs/b/model"]) == {"a-model": "runs/a/model", "b-model": "runs/b/model"}
    assert labelled_models(["best=x/model", "y/model"]) == {"best": "x/model", "model": "y/model"}
    assert labelled_models(["owner/name"]) == {"name": "owner/name"}
    for entries in (["a=x", "a=y"], ["x", "x"], ["a b=x"]):
        with pytest.raises(InputError):
            labelled_models(entries)


def test_models_on_local_files_without_the_network(
    tmp_path, asked_of_the_network, student_path, eval_pairs_path, capsys
):
    rewardbench = tmp_path / "rewardbench.jsonl"
    records = [
        {"prompt": f"Order {n}?", "chosen": "The lamp, please.", "rejected": "No.", "subset": subset}
        for subset in ("hep-go", "donotanswer")
        for n in range(6)
    ]
    rewardbench.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "out"
    flags = ["--device", "cpu", "--output_dir", str(folder)]
    benchmarks = [f"held-out={eval_pairs_path}", f"rewardbench={rewardbench}"]
    main([str(student_path), f"again={student_path}", "--benchmark", *benchmarks, *flags])
    assert asked_of_the_network == []
    printed = capsys.readouterr().out
    label = student_path.name
    assert all(text in printed for text in ("held-out", "rewardbench", "Leaderboard", label, "again", "length only"))
    written = json.loads((folder / "evaluation.json").read_text())
    assert [table["title"] for table in written["tables"]] == ["held-out", "rewardbench"]
    first, again = (read_outcomes(folder / "outcomes" / name / "held-out.jsonl") for name in (label, "again"))
    assert len(first) == 11
    assert first.chosen_reward.tolist() == again.chosen_reward.tolist()
    accuracy = written["tables"][0]["scores"][0]["models"][label]["accuracy"]
    assert accuracy == pytest.approx(first.won.mean())
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    # Other results are not mixed with these.
    with pytest.raises(SystemExit):
        main([str(student_path), "--benchmark", f"rewardbench={rewardbench}", *flags])
    assert "holds another evaluation" in capsys.readouterr().err
    main([str(student_path), "--benchmark", f"rewardbench={rewardbench}", *flags, "--overwrite"])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jsonl"))
    assert left == [f"outcomes/{label}/rewardbench.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--benchmark", "{pairs}", "--beta", "0.1"], "--beta: is for DPO policies"),
        (
            ["--benchmark", "{pairs}", "--implicit_reward", "{model}", "--reference_free"],
            "--reference_free: contradicts",
        ),
        (["--benchmark", "{pairs}", "--reference_free"], "is a sequence classifier"),
        (["--benchmark", "{pairs}", "--batch_size", "0"], "--batch_size: expected at least 1, got 0"),
        (["--benchmark", "{pairs}", "--max_length", "4"], "--max_length: expected at least 8 tokens, got 4"),
        (["--benchmark", "{pairs}", "--confidence", "95"], "--confidence: expected a share between 0 and 1"),
        (["--benchmark", "{pairs}", "--device", "tpu9"], "--device tpu9: is not there"),
        (["--benchmark", "{pairs}", "--dtype", "int3"], "argument --dtype: invalid choice"),
        (["--benchmark", "{pairs}", "./nowhere"], "benchmark ./nowhere|./nowhere: no such f"),
        ([], "the following arguments are required: --benchmark"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(tmp_path, student_path, eval_pairs_path, capsys, flags, message):
    flags = [flag.format(pairs=eval_pairs_path, model=student_path) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        main([str(student_path), "--output_dir", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert any(part in errors[0] for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_downloaded_is_said_before_and_in_one_line(tmp_path, student_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    program = "import sys; from idrm.cli import main; main()"
    flags = ["eval", str(student_path), "--benchmark", "rewardbench", "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-c", program, *flags]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 2
    assert "rewardbench: downloads allenai/reward-bench, unless it is on this machine already." in run.stderr
    last = run.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: allenai/reward-bench: cannot be loaded: ")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
