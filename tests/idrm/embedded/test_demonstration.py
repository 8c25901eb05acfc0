"""The demonstration around its stages: whose folder it is, what it prepares, the control's teacher."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm import untrained_student as student
from idrm.arguments import parse_arguments
from idrm.embedded import demonstration
from idrm.embedded.demonstration import DEMONSTRATION_FILE
from idrm.embedded.stages import StageFailed
from idrm.errors import InputError


@pytest.fixture
def stages_seen(monkeypatch):
    """Runs no stage and prints no table, and returns the stages that were asked for."""
    seen = []
    monkeypatch.setattr(demonstration, "run_stages", lambda folder, stages: seen.append((folder, stages)))
    monkeypatch.setattr(demonstration, "write_data_and_student", lambda folder, seed, sizes: None)
    monkeypatch.setattr(demonstration, "print_report", lambda folder, runs: seen.append((folder, runs)))
    monkeypatch.delenv("RANK", raising=False)
    return seen


def run(folder, *flags: str):
    demonstration.run(parse_arguments(["--output_dir", str(folder), *flags]))


def test_one_seed_runs_in_the_output_folder_itself(tmp_path, stages_seen):
    run(tmp_path / "out", "--seed", "5")
    (folder, stages), (reported, runs) = stages_seen
    assert folder == reported == tmp_path / "out"
    assert [stage.name for stage in stages] == ["teacher", "bt", "idrm"]
    assert runs == {5: tmp_path / "out"}
    assert json.loads((tmp_path / "out" / DEMONSTRATION_FILE).read_text()) == {"seed": 5}


def test_several_seeds_have_folders_of_their_own_and_the_control_comes_last(tmp_path, stages_seen):
    run(tmp_path, "--embedded_seeds", "2", "--embedded_control", "--seed", "1")
    assert [folder for folder, _ in stages_seen[:2]] == [tmp_path / "seed_1", tmp_path / "seed_2"]
    assert [stage.name for stage in stages_seen[0][1]] == ["teacher", "bt", "idrm", "control"]
    assert stages_seen[2][1] == {1: tmp_path / "seed_1", 2: tmp_path / "seed_2"}


def test_the_same_flags_go_on_and_others_are_refused(tmp_path, stages_seen):
    run(tmp_path, "--learning_rate", "0.01")
    run(tmp_path, "--learning_rate", "0.01", "--resume_from_checkpoint")
    with pytest.raises(InputError, match=r"holds this demonstration with learning_rate 0\.01 and not 0\.02"):
        run(tmp_path, "--learning_rate", "0.02")
    with pytest.raises(InputError, match="with embedded_control 'not given' and not True"):
        run(tmp_path, "--learning_rate", "0.01", "--embedded_control")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, stages_seen):
    (tmp_path / "run.yaml").write_text("alpha: 1\n")
    with pytest.raises(InputError, match="holds something else"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "run.yaml")


def test_the_exit_status_of_a_failed_stage_is_passed_on(tmp_path, stages_seen, monkeypatch):
    def fail(folder, stages):
        raise StageFailed(stages[1], 7)

    monkeypatch.setattr(demonstration, "run_stages", fail)
    with pytest.raises(SystemExit) as ending:
        run(tmp_path)
    assert ending.value.code == 7


def test_a_teacher_without_model_and_data_is_refused():
    with pytest.raises(InputError, match="--teacher_name_or_path needs a model and data"):
        parse_arguments(["--teacher_name_or_path", "somewhere"])


def test_the_untrained_student_loads_as_a_reward_model(tmp_path):
    texts = ["Contact: Zoë.", "Sticker: 🎈."] * 4
    student.save_untrained(tmp_path / "student", texts, seed=0, size=student.Size(vocab_size=300))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer(texts[1])["input_ids"]) == texts[1]
    again = tmp_path / "again"
    student.save_untrained(again, texts, seed=0, size=student.Size(vocab_size=300))
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / "student" / name).read_bytes()
