"""The flags of `idrm teacher`, what follows from them, and the recipes."""

from pathlib import Path

import pytest
import yaml

from idrm.errors import InputError
from idrm.nli.arguments import parse_arguments

RUN = ["--model_name_or_path", "encoder", "--dataset_name", "snli.jsonl"]
RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes" / "teacher").glob("*.yaml"))


def test_a_newcomers_flags_are_enough():
    config = parse_arguments([*RUN, "--use_cpu", "true"])
    assert config.data.dataset_name == ["snli.jsonl"]
    args = config.training_arguments()
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (2e-5, 3.0, 32)
    assert (args.weight_decay, args.warmup_steps, args.lr_scheduler_type) == (0.01, 0.06, "linear")
    assert (args.eval_strategy, args.save_strategy, args.load_best_model_at_end) == ("epoch", "epoch", True)
    assert (args.metric_for_best_model, args.greater_is_better) == ("accuracy", True)
    assert args.label_names == ["labels"]
    assert args.early_stopping_patience == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--eval_steps", "40"], {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 40}),
        (["--eval_strategy", "steps", "--logging_steps", "7"], {"save_strategy": "steps", "save_steps": 7}),
        (["--eval_steps", "40", "--save_steps", "80"], {"save_strategy": "steps", "save_steps": 80}),
        (["--eval_strategy", "no"], {"load_best_model_at_end": False, "early_stopping_patience": 0}),
        (["--save_strategy", "no"], {"load_best_model_at_end": False, "early_stopping_patience": 2}),
    ],
)
def test_saving_follows_evaluation(flags, expected, tmp_path):
    config = parse_arguments([*RUN, *flags])
    assert {name: config.training[name] for name in expected} == expected
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.recorded))
    again = parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert again.training == config.training
    assert again.recorded == config.recorded


def test_a_metric_that_should_fall():
    config = parse_arguments([*RUN, "--metric_for_best_model", "loss", "--use_cpu", "true"])
    assert config.training_arguments().greater_is_better is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", "x"], "needs data: give --dataset_name"),
        ([*RUN, "--eval_share", "1"], "--eval_share: expected a share between 0 and 1, got 1.0"),
        ([*RUN, "--eval_share", "0.1", "--eval_dataset_name", "x"], "give one of them"),
        ([*RUN, "--early_stopping_patience", "-1"], "--early_stopping_patience: expected at least 0, got -1"),
        ([*RUN, "--eval_strategy", "no", "--early_stopping_patience", "1"], "needs evaluations"),
        ([*RUN, "--label_names", "yes", "no"], "--label_names: expected two or three labels with 'entailment'"),
        ([*RUN, "--test_dataset_name", "a.jsonl", "b.jsonl"], "--test_dataset_name a.jsonl: expected name=path"),
        ([*RUN, "--pooling", "max"], "--pooling: invalid choice: 'max'"),
        ([*RUN, "--batch_eval_metrics", "true"], "--batch_eval_metrics: is not for NLI"),
        ([*RUN, "--fsdp", "full_shard"], "--fsdp: is not there yet"),
        ([*RUN, "--max_length", "4"], "--max_length: expected at least 8, got 4"),
        ([*RUN, "--pairs_name", "hh.jsonl"], "--pairs_name is for --check"),
        (["--model_name_or_path", "x", "--check"], "give --eval_dataset_name or --pairs_name"),
        ([*RUN, "--alpha", "1"], "--alpha"),
        ([*RUN, "--learning_rate", "nan"], "--learning_rate: expected at least 0.0, got nan"),
        ([*RUN, "--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got -1"),
        ([*RUN, "--num_train_epochs", "-3"], "--num_train_epochs: expected more than 0, got -3"),
        ([*RUN, "--deepspeed", '{"zero_optimization": {"stage": 3}}'], "stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_contradictions_are_refused(argv, message):
    with pytest.raises(InputError) as refusal:
        parse_arguments(argv)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_runs(path):
    config = parse_arguments(["--config", str(path), "--output_dir", "out"])
    assert config.training["output_dir"] == "out"
    text = path.read_text()
    assert ("Not run here" in text) == (path.stem != "minilm-snli")
    assert "# Source:" in text


def test_recipes_are_found():
    assert len(RECIPES) >= 6
