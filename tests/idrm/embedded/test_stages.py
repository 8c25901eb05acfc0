"""Stages run once, in order, as fresh processes; what failed or is unfinished runs again, what is finished does not."""

import json
import sys

import pytest

from idrm.arguments import parse_arguments
from idrm.embedded.stages import (
    FINISHED_FILE,
    Stage,
    StageFailed,
    recipe,
    run_stages,
    student_command,
)


def appending(name: str, path, status: int = 0) -> Stage:
    """A stage that notes its name, its process's port and import path, and ends with `status`."""
    code = (
        "import os, sys; "
        f"print({name!r}, os.environ.get('MASTER_PORT'), file=open({str(path)!r}, 'a')); "
        f"import idrm; sys.exit({status})"
    )
    return Stage(name, name, lambda: [sys.executable, "-c", code])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_stages_run_in_order_and_once(tmp_path):
    log = tmp_path / "log"
    stages = [appending("first", log), appending("second", log)]
    seconds = run_stages(tmp_path, stages)
    assert list(seconds) == ["first", "second"]
    assert json.loads((tmp_path / FINISHED_FILE).read_text()) == seconds
    assert run_stages(tmp_path, stages) == seconds
    assert log.read_text().split() == ["first", "None", "second", "None"]


def test_a_failed_stage_ends_the_run_and_is_repeated_by_the_next(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StageFailed, match="second failed with exit status 3") as failure:
        run_stages(tmp_path, [appending("first", log), appending("second", log, status=3), appending("third", log)])
    assert failure.value.status == 3
    run_stages(tmp_path, [appending("first", log), appending("second", log), appending("third", log)])
    assert log.read_text().split()[::2] == ["first", "second", "second", "third"]


def test_with_two_ranks_each_stage_has_a_port_of_its_own_and_the_first_rank_keeps_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "1")
    log = tmp_path / "log"
    run_stages(tmp_path, [appending("first", log), appending("second", log)])
    assert log.read_text().split() == ["first", "29501", "second", "29502"]
    assert not (tmp_path / FINISHED_FILE).exists()


def parsed(command: list[str]):
    assert command[0] == sys.executable
    assert command[1].endswith("train.py")
    return parse_arguments(command[2:])


def test_the_students_commands_are_ordinary_ones_that_differ_in_the_teacher_alone(tmp_path):
    alone = parsed(student_command(tmp_path, "bt", 7, {}, {"alpha": 0}))
    taught = parsed(student_command(tmp_path, "idrm", 7, {}, {}))
    assert not alone.is_embedded
    assert alone.interaction.alpha == 0
    assert taught.interaction.alpha == 1
    assert taught.interaction.student_layers == recipe()["student_layers"]
    assert taught.model.teacher_name_or_path == str(tmp_path / "teacher")
    different = {name for name in alone.training if alone.training[name] != taught.training[name]}
    assert different <= {"output_dir"}
    assert alone.data == taught.data
    assert alone.training["seed"] == 7


def test_flags_of_the_user_win_over_the_demonstrations_own(tmp_path):
    flags = "--num_train_epochs 1 --learning_rate 1e-5 --use_cpu true --seed 3"
    flags += " --alpha 0.5 --top_blocks 1 --interaction_rows all"
    given = parse_arguments([*flags.split(), "--output_dir", str(tmp_path), "--embedded_control"]).given
    taught = parsed(student_command(tmp_path, "idrm", 3, given, {}))
    assert taught.training["num_train_epochs"] == 1
    assert taught.training["learning_rate"] == 1e-5
    assert taught.training["use_cpu"] is True
    assert taught.training["output_dir"] == str(tmp_path / "idrm")
    assert taught.interaction.alpha == 0.5
    assert taught.interaction.top_blocks == 1
    assert taught.interaction.interaction_rows == "all"
    assert taught.interaction.student_layers is None
    assert parsed(student_command(tmp_path, "bt", 3, given, {"alpha": 0})).interaction.alpha == 0


def test_ranks_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    command = parsed(student_command(tmp_path, "bt", 0, {}, {"alpha": 0}))
    assert command.training["per_device_train_batch_size"] == recipe()["per_device_train_batch_size"] // 4


def test_an_interrupted_student_goes_on_from_its_checkpoint(tmp_path):
    (tmp_path / "bt").mkdir()
    assert parsed(student_command(tmp_path, "bt", 0, {}, {"alpha": 0})).training["resume_from_checkpoint"] is None
    (tmp_path / "bt" / "run.yaml").write_text("alpha: 0\n")
    assert parsed(student_command(tmp_path, "bt", 0, {}, {"alpha": 0})).training["resume_from_checkpoint"] == "true"
