"""`idrm pipeline` from a file to its tables: real processes on the demonstration's data, with its judge."""

import json

import pytest
import yaml

from idrm.errors import InputError
from idrm.pipeline import command
from idrm.pipeline.steps import StepFailed

PIPELINE = {
    "title": "A pipeline",
    "note": "Nothing is learnt.",
    "embedded_judge": "judge",
    "steps": {
        "materials": {
            "command": "embedded",
            "flags": {"train_pairs": 60, "evaluation_pairs": 12, "nli_pairs": 60, "teacher_max_steps": 2},
        },
        "models": {"command": "grid", "inputs": ["grid.yaml"], "flags": {"values": ["materials={materials}"]}},
        "answers": {
            "command": "policy generate",
            "each": {"hot": 2.0, "cold": 0.5},
            "flags": {
                "model_name_or_path": "{materials}/policy",
                "dataset_name": "{materials}/data/neutral.jsonl",
                "temperature": "{each}",
                "max_new_tokens": 8,
            },
        },
        "judged": {
            "command": "judge",
            "inputs": ["{answers-hot}", "{answers-cold}"],
            "flags": {"endpoint": "{judge}", "judge_model": "embedded-judge"},
        },
    },
    "tables": [{"title": "Hot against", "judged": {"cold": "judged"}}, {"grid": "models"}],
}
GRID = {
    "title": "Untrained",
    "benchmarks": {"neutral": "{materials}/data/neutral.jsonl"},
    "rows": [{"name": "student", "model": "{materials}/student"}],
}


@pytest.fixture
def pipeline_file(tmp_path):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    return path


def test_a_pipeline_runs_to_its_tables_once(tmp_path, pipeline_file, capsys):
    folder = tmp_path / "out"
    command.main([str(pipeline_file), "--output_dir", str(folder), "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "Hot against" in printed
    assert "Nothing is learnt." in printed
    text = (folder / "tables.md").read_text()
    assert text.startswith("# A pipeline\n\n## Hot against\n\n**Nothing is learnt.**\n\n| against | win | tie | lose |")
    assert "| cold (12 prompts) | 0.0 | 100.0 | 0.0 | 0.0 | - | - |" in text
    assert "\n## Untrained\n\n**Nothing is learnt.**\n\n|  | neutral |\n" in text
    assert "| student (one model) | " in text
    judged, grid = json.loads((folder / "tables.json").read_text())["tables"]
    # Untrained models write no fact of any prompt: for the judge all of it stands at nothing.
    result = judged["rows"]["cold"]
    assert (result["pairs"], result["ties"], result["answered_by"]) == (12, 12, ["embedded-judge"])
    assert grid["rows"]["student"]["seeds"] == []
    assert len(grid["rows"]["student"]["scores"]["neutral"]["values"]) == 1
    log = (folder / "logs" / "judged.log").read_text()
    assert f"idrm judge {folder}/steps/answers-hot.jsonl {folder}/steps/answers-cold.jsonl" in log

    modified = (folder / "steps" / "judged" / "judge.json").stat().st_mtime_ns
    command.main([str(pipeline_file), "--output_dir", str(folder)])
    assert (folder / "steps" / "judged" / "judge.json").stat().st_mtime_ns == modified
    assert (folder / "tables.md").read_text() == text


def test_what_would_fail_later_is_refused_at_once(tmp_path, pipeline_file, capsys):
    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit) as ending:
            command.main([str(pipeline_file), "--output_dir", str(tmp_path / "out"), *flags])
        assert ending.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--jobs: expected at least 1" in refused("--jobs", "0")
    assert "--values pairs: " in refused("--values", "pairs=p.jsonl")
    assert "--values x: expected name=value" in refused("--values", "x")
    assert "--launcher no-such-program: expected a program" in refused("--launcher", "no-such-program")
    assert "--launcher 'unclosed: no closing quotation" in refused("--launcher", "'unclosed")
    content = {**PIPELINE, "steps": {**PIPELINE["steps"], "model": {"command": "train", "flags": {"alpha": "x"}}}}
    pipeline_file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert "error: step model: argument --alpha: invalid float value: 'x'" in refused()
    assert not (tmp_path / "out").exists()


def test_the_exit_status_of_a_failed_step_is_passed_on(tmp_path, pipeline_file, capsys, monkeypatch):
    log = tmp_path / "mean.log"
    log.write_text("error: nowhere: no such folder\n")

    def fail(pipeline, place, **_):
        raise StepFailed(pipeline.steps[0], 7, log)

    monkeypatch.setattr(command, "run_steps", fail)
    with pytest.raises(SystemExit) as ending:
        command.main([str(pipeline_file), "--output_dir", str(tmp_path / "out")])
    assert ending.value.code == 7
    assert "error: nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tables.md").exists()


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        command.parse_arguments(["none.yaml"])
