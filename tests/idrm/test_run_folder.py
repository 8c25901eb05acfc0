"""What a resumed run is told about its folder."""

import logging

import pytest
import yaml

from idrm.arguments import parse_arguments
from idrm.errors import InputError
from idrm.nli.arguments import parse_arguments as parse_teacher_arguments
from idrm.run_folder import resume_checkpoint, write_run_file


def test_a_resumed_run_says_which_of_its_values_are_others_now(tmp_path, caplog):
    flags = ["--model_name_or_path", "m", "--teacher_name_or_path", "t", "--dataset_name", "pairs.jsonl"]
    flags += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    write_run_file(parse_arguments([*flags, "--learning_rate", "1e-4", "--seed", "3"]))
    with caplog.at_level(logging.WARNING, logger="idrm"):
        same = parse_arguments([*flags, "--learning_rate", "1e-4", "--seed", "3", "--resume_from_checkpoint"])
        assert resume_checkpoint(same) is None
        assert not caplog.messages
        changed = parse_arguments([*flags, "--learning_rate", "2e-4", "--resume_from_checkpoint"])
        assert resume_checkpoint(changed) is None
    assert caplog.messages == ["Resumed with other values than the run began with: learning_rate, seed."]


def test_a_checkpoint_whose_trainer_state_is_half_written_is_passed_over(tmp_path):
    flags = ["--model_name_or_path", "m", "--alpha", "0", "--dataset_name", "pairs.jsonl"]
    config = parse_arguments([*flags, "--output_dir", str(tmp_path), "--resume_from_checkpoint"])
    write_run_file(config)
    for step, state in ((4, "{}"), (8, '{"log_history": ['), (12, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert resume_checkpoint(config) == tmp_path / "checkpoint-4"


def test_a_cache_may_move_but_neither_come_nor_go(tmp_path):
    flags = ["--model_name_or_path", "m", "--teacher_name_or_path", "t", "--dataset_name", "pairs.jsonl"]
    for number, (before, after) in enumerate([("a", "b"), (None, "b"), ("a", None)]):
        output = ["--output_dir", str(tmp_path / str(number))]
        cached, resumed = ([*flags, *output, *(["--teacher_cache", name] if name else [])] for name in (before, after))
        write_run_file(parse_arguments(cached))
        config = parse_arguments([*resumed, "--resume_from_checkpoint"])
        if number == 0:
            assert resume_checkpoint(config) is None
        else:
            with pytest.raises(InputError, match="holds another run, with teacher_cache"):
                resume_checkpoint(config)


def test_a_run_file_of_an_earlier_version_lacks_what_came_later(tmp_path):
    flags = ["--model_name_or_path", "m", "--alpha", "0", "--dataset_name", "pairs.jsonl"]
    flags += ["--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    config = parse_arguments(flags)
    recorded = {name: value for name, value in config.recorded.items() if name != "linear_probing"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recorded))
    assert resume_checkpoint(config) is None
    with pytest.raises(InputError, match="holds another run, with linear_probing False and not True"):
        resume_checkpoint(parse_arguments([*flags, "--linear_probing", "true"]))


def test_the_seed_that_chose_the_pairs_held_out_may_not_change(tmp_path, caplog):
    flags = ["--model_name_or_path", "m", "--dataset_name", "snli.jsonl", "--output_dir", str(tmp_path)]
    write_run_file(parse_teacher_arguments([*flags, "--seed", "3"]))
    assert resume_checkpoint(parse_teacher_arguments([*flags, "--seed", "3", "--resume_from_checkpoint"])) is None
    with pytest.raises(InputError, match="holds another run, with seed 3 and not its default"):
        resume_checkpoint(parse_teacher_arguments([*flags, "--resume_from_checkpoint"]))
    flags += ["--eval_dataset_name", "dev.jsonl"]
    write_run_file(parse_teacher_arguments([*flags, "--seed", "3"]))
    with caplog.at_level(logging.WARNING, logger="idrm"):
        assert resume_checkpoint(parse_teacher_arguments([*flags, "--resume_from_checkpoint"])) is None
    assert "Resumed with other values than the run began with: seed." in caplog.messages
