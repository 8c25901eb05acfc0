"""Flags, YAML files, and the contradictions that are refused before anything is loaded."""

import json
from pathlib import Path

import pytest
import yaml

from idrm.arguments import named_evaluation_sets, paired_layers, parse_arguments
from idrm.errors import InputError

RUN = ["--model_name_or_path", "student", "--teacher_name_or_path", "teacher", "--dataset_name", "pairs.jsonl"]


@pytest.fixture
def write_yaml(tmp_path):
    def write(content):
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def test_a_flag_beats_the_yaml_file_wherever_it_stands(write_yaml):
    path = write_yaml({"alpha": 0.5, "learning_rate": "3e-6", "student_layers": [-1, -2], "teacher_layers": [-1, -2]})
    for argv in (["--config", path, "--alpha", "0.25"], ["--alpha", "0.25", "--config", path]):
        config = parse_arguments(RUN + argv)
        assert config.interaction.alpha == 0.25
        assert config.training["learning_rate"] == 3e-6
        assert config.interaction.student_layers == [-1, -2]
    assert parse_arguments([*RUN, "--config", path]).interaction.alpha == 0.5


def test_a_list_on_the_command_line_replaces_that_of_the_file(write_yaml):
    path = write_yaml({"student_layers": [-1, -2], "teacher_layers": [-1, -2]})
    config = parse_arguments([*RUN, "--config", path, "--student_layers", "0", "--teacher_layers", "1"])
    assert paired_layers(config.interaction) == ([0], [1])


def test_a_yaml_file_names_evaluation_sets_by_a_mapping(write_yaml):
    path = write_yaml({"eval_dataset_name": {"near": "a.jsonl", "far": "b.jsonl"}, "bf16": False, "seed": None})
    config = parse_arguments([*RUN, "--config", path])
    assert named_evaluation_sets(config.data.eval_dataset_name) == {"near": "a.jsonl", "far": "b.jsonl"}
    assert config.training["seed"] == 42


def test_a_path_with_an_equals_sign_is_no_name():
    assert named_evaluation_sets(["runs/lr=1/x.jsonl"]) == {"": "runs/lr=1/x.jsonl"}
    assert named_evaluation_sets(["near=runs/lr=1/x.jsonl"]) == {"near": "runs/lr=1/x.jsonl"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"alhpa": 1}, r"run\.yaml: unknown key 'alhpa'"),
        ({"alpha": "much"}, r"run\.yaml: argument --alpha: invalid float value: 'much'"),
        ({"reduction": "sum"}, r"run\.yaml: argument --reduction: invalid choice: 'sum'"),
        ("a: b\nc: [1,", r"run\.yaml:2: is not valid YAML"),
        ("- alpha", r"run\.yaml: expected a mapping of flags to values, found list"),
    ],
)
def test_a_fault_in_the_yaml_file_is_named_with_the_file(write_yaml, content, message):
    with pytest.raises(InputError, match=message):
        parse_arguments([*RUN, "--config", write_yaml(content)])


def test_a_missing_yaml_file():
    with pytest.raises(InputError, match=r"--config none\.yaml: cannot be read"):
        parse_arguments(["--config", "none.yaml"])


def test_what_is_recorded_reads_back_as_the_same_run(write_yaml):
    argv = [
        *RUN,
        "--alpha",
        "0.8",
        "--top_blocks",
        "2",
        "--eval_dataset_name",
        "a=x.jsonl",
        "b=y.jsonl",
        "--bf16",
        "true",
    ]
    first = parse_arguments([*argv, "--resume_from_checkpoint"])
    again = parse_arguments(["--config", write_yaml(first.recorded)])
    assert again.recorded == first.recorded
    assert (again.model, again.data, again.interaction) == (first.model, first.data, first.interaction)
    assert "resume_from_checkpoint" not in first.recorded
    assert first.training["resume_from_checkpoint"] == "true"
    assert again.training == {**first.training, "resume_from_checkpoint": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_name", "x.jsonl"], "needs a model to train: give --model_name_or_path"),
        (["--model_name_or_path", "x"], "needs data: give --dataset_name"),
        (["--model_name_or_path", "x", "--dataset_name", "y"], "--alpha 1 needs a teacher"),
        ([*RUN, "--alpha", "-1"], "--alpha: expected at least 0.0, got -1.0"),
        ([*RUN, "--alpha", "nan"], "--alpha: expected at least 0.0, got nan"),
        ([*RUN, "--alpha", "inf"], "--alpha: expected at least 0.0, got inf"),
        ([*RUN, "--per_device_train_batch_size", "0"], "--per_device_train_batch_size: expected at least 1, got 0"),
        ([*RUN, "--intra_weight", "0", "--inter_weight", "0"], "are both 0"),
        ([*RUN, "--label_smoothing_factor", "0.1"], "--label_smoothing_factor: is not for preference pairs"),
        ([*RUN, "--fsdp", "full_shard"], "--fsdp: is not there yet"),
        ([*RUN, "--prediction_loss_only", "true"], "--prediction_loss_only: is not for preference pairs"),
        ([*RUN, "--max_length", "0"], "--max_length: expected at least 8, got 0"),
        ([*RUN, "--max_length", "long"], "argument --max_length/--max-length: invalid int value: 'long'"),
        ([*RUN, "--tokens_per_batch", "0"], "--tokens_per_batch: expected at least 1, got 0"),
        ([*RUN, "--tokens_per_batch", "9", "--share_prompt", "off"], "leave --share_prompt off out"),
        (
            [*RUN, "--tokens_per_batch", "9", "--dataloader_drop_last", "true"],
            "--dataloader_drop_last: is not for batches of --tokens_per_batch; leave it out",
        ),
        (
            [*RUN, "--tokens_per_batch", "9", "--train_sampling_strategy", "sequential"],
            "--train_sampling_strategy: is not for batches of --tokens_per_batch; leave it out",
        ),
        ([*RUN, "--num_head_groups", "0"], "--num_head_groups: expected at least 1, got 0"),
        ([*RUN, "--top_blocks", "2", "--student_layers", "-1"], "say the same thing twice"),
        ([*RUN, "--student_layers", "-1", "-2"], "got 2 and 1 blocks"),
        ([*RUN, "--eval_dataset_name", "x.jsonl", "y.jsonl"], "expected name=path"),
        ([*RUN, "--eval_dataset_name", "a=x.jsonl", "a=y.jsonl"], "expected name=path"),
        ([*RUN, "--eval_strategy", "steps"], "--eval_strategy steps needs pairs"),
        ([*RUN, "--alfa", "1"], "--alfa"),
        ([*RUN, "--deepspeed", "none.json"], "--deepspeed none.json: cannot be read"),
        ([*RUN, "--learning_rate", "nan"], "--learning_rate: expected at least 0.0, got nan"),
        ([*RUN, "--learning_rate", "-1"], "--learning_rate: expected at least 0.0, got -1.0"),
        ([*RUN, "--adam_epsilon", "-1"], "--adam_epsilon: expected at least 0.0, got -1.0"),
        ([*RUN, "--adam_beta2", "2"], "--adam_beta2: expected less than 1, got 2.0"),
        ([*RUN, "--dataloader_num_workers", "-1"], "--dataloader_num_workers: expected at least 0, got -1"),
        ([*RUN, "--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got -1"),
        ([*RUN, "--seed", "4294967296"], "--seed: expected an integer from 0 to 4294967295, got 4294967296"),
        ([*RUN, "--data_seed", "-1"], "--data_seed: expected an integer from 0 to 4294967295, got -1"),
        ([*RUN, "--num_train_epochs", "0"], "--num_train_epochs: expected more than 0, got 0"),
        ([*RUN, "--num_train_epochs", "nan"], "--num_train_epochs: expected more than 0, got nan"),
    ],
)
def test_contradictions_are_refused(argv, message):
    with pytest.raises(InputError) as refusal:
        parse_arguments(argv)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization":\n {"stage": 3,}}', r"ds\.json:2: is not valid JSON"),
        ("[]", r"ds\.json: expected a JSON object, found list"),
        (json.dumps({"zero_optimization": {"stage": 3}}), "stage3_gather_16bit_weights_on_model_save: true"),
    ],
)
def test_a_deepspeed_configuration_that_could_not_save_is_refused(tmp_path, content, message):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(InputError, match=message):
        parse_arguments([*RUN, "--deepspeed", str(tmp_path / "ds.json")])


def test_what_a_training_may_still_be_told():
    flags = ["--seed", str(2**32 - 1), "--learning_rate", "0", "--num_train_epochs", "0", "--max_steps", "4"]
    assert parse_arguments([*RUN, *flags]).training["max_steps"] == 4


def test_neither_model_nor_data_is_the_embedded_demonstration():
    assert parse_arguments([]).is_embedded
    assert not parse_arguments(RUN).is_embedded


def test_bradley_terry_needs_no_teacher():
    assert parse_arguments(["--model_name_or_path", "x", "--dataset_name", "y", "--alpha", "0"]).interaction.alpha == 0


def test_training_arguments_suit_preference_pairs():
    args = parse_arguments([*RUN, "--remove_unused_columns", "true", "--use_cpu", "true"]).training_arguments()
    assert args.remove_unused_columns is False
    assert args.label_names == []
    assert args.report_to == []


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [
        ("eval_near_interaction_ratio", False),
        ("eval_preference_loss", False),
        ("eval_latent_kl", False),
        ("eval_accuracy", True),
    ],
)
def test_the_best_model_is_the_one_with_less_of_what_should_fall(metric, greater_is_better):
    args = parse_arguments([*RUN, "--use_cpu", "true", "--metric_for_best_model", metric]).training_arguments()
    assert args.greater_is_better is greater_is_better


def test_training_arguments_that_contradict_one_another_are_bad_input():
    config = parse_arguments([*RUN, "--use_cpu", "true", "--fp16", "true", "--bf16", "true"])
    with pytest.raises(InputError, match="At most one of fp16 and bf16"):
        config.training_arguments()


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml")), ids=str)
def test_recipes_are_runs(path):
    config = parse_arguments(["--config", str(path), "--output_dir", "out"])
    assert config.is_embedded or config.data.dataset_name
    assert config.training["output_dir"] == "out"
