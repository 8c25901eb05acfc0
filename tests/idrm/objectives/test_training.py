"""The objectives in training: alone, with the interaction loss, at two ranks under ZeRO-3, saved and resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm.arguments import parse_arguments
from idrm.errors import InputError
from idrm.metrics import COLUMNS
from idrm.objectives import PreferenceLoss, draw_pair_order
from idrm.preference import load_preferences
from idrm.train import main as train_main
from idrm.train import train as train_model

MARGINS = [0.5, -1.0, 0.0, 2.0, 1.0, -0.5, 0.25, 3.0]


def batch_of(trainer):
    pairs = [{**trainer.train_dataset[index], "margin": margin} for index, margin in enumerate(MARGINS)]
    return trainer._prepare_inputs(trainer.data_collator(pairs))


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_the_loss_of_a_batch_is_the_sum_of_its_terms(make_trainer, alpha):
    """Margin, smoothing, confidence and bottleneck, in a float64 model with its noise drawn again by hand."""
    trainer = make_trainer(
        alpha=alpha,
        preference_loss=PreferenceLoss(label_smoothing=0.1, confidence_weight=0.5, confidence_warmup=0.2),
        bottleneck=(16, "paper"),
        bottleneck_weight=0.1,
        prepare=lambda pairs: draw_pair_order(pairs, seed=0),
        max_steps=10,
    )
    model = trainer.model.double().train()
    trainer.state.global_step, trainer.state.max_steps = 1, 10
    batch = batch_of(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, batch)
    gradient = torch.autograd.grad(loss, model.score.mean.weight)[0]

    torch.manual_seed(5)
    states = model.model(**inputs).last_hidden_state
    mean, log_variance = model.score.mean(states), model.score.log_variance(states)
    latent = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
    last = inputs["attention_mask"].sum(1) - 1
    rows = torch.arange(len(last))
    rewards = model.score.reward(latent)[rows, last, 0].float()
    chosen, rejected = rewards.view(2, -1)
    difference = chosen - rejected - torch.tensor(MARGINS)
    first = batch["chosen_is_first"]
    ranks = torch.where(first, difference, -difference).argsort(descending=True).argsort()
    agrees = ((ranks < first.sum()) == first).float()
    target = 0.75 * 0.9 + 0.25 * agrees
    expected = torch.nn.functional.binary_cross_entropy_with_logits(difference, target)
    divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(-1)[rows, last]
    expected = expected + 0.1 * divergence.view(2, -1).sum(0).mean()
    if alpha:
        _, student = trainer._forward(model, batch)
        teacher = trainer.interaction.teacher_attention(batch["interaction"])
        expected = expected + alpha * trainer.interaction.batch_loss(student, teacher, batch["interaction"]).loss
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, model.score.mean.weight)[0], rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("divergence", ["paper", "official"])
def test_records_have_the_divergence_and_it_is_pressed_down(make_trainer, divergence):
    trainer = make_trainer(alpha=0, bottleneck=(8, divergence), bottleneck_weight=1.0, max_steps=8, learning_rate=1e-2)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert records[-1]["latent_kl"] < 0.9 * records[0]["latent_kl"]
    for record in records:
        assert record["loss"] == pytest.approx(record["preference_loss"] + record["latent_kl"], rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_preference_loss"] + metrics["eval_latent_kl"], rel=1e-5)


def test_evaluation_leaves_the_confidence_term_out(make_trainer):
    """It compares the pairs of a batch, and an evaluation's mean must not depend on its batches."""
    plain = make_trainer(alpha=0)
    loss = plain.evaluate()["eval_preference_loss"]
    for size in (2, 11):
        trainer = make_trainer(
            alpha=0, preference_loss=PreferenceLoss(confidence_weight=0.9), per_device_eval_batch_size=size
        )
        ordered = draw_pair_order(trainer.eval_dataset, 0)
        assert trainer.evaluate(ordered)["eval_preference_loss"] == pytest.approx(loss, rel=1e-6)


def test_evaluation_has_margins(make_trainer):
    trainer = make_trainer(alpha=0)
    margins = [0.25 * index for index in range(len(trainer.eval_dataset))]
    evaluated = trainer.eval_dataset.remove_columns("margin").add_column("margin", margins)
    rows = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    chosen, rejected = (rows[:, COLUMNS.index(name)] for name in ("chosen_reward", "rejected_reward"))
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean().item()
    assert trainer.evaluate(evaluated)["eval_preference_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_confidence_loss_without_an_order_is_an_error(make_trainer):
    trainer = make_trainer(alpha=0, preference_loss=PreferenceLoss(confidence_weight=0.5))
    with pytest.raises(ValueError, match="does nothing without the order"):
        trainer.train()


def test_every_flag_of_the_command_reaches_the_loss(tmp_path, student_path, judged_pairs_path):
    """By the first record, of one batch of all pairs at learning rate 0, against the formulas on a plain run's."""

    def first_record(name, *flags):
        size = ("--per_device_train_batch_size", 48, "--max_steps", 1, "--logging_steps", 1, "--learning_rate", 0)
        quiet = ("--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true")
        models = ("--model_name_or_path", student_path, "--dataset_name", judged_pairs_path, "--alpha", 0)
        command = [*map(str, (*models, *size, *quiet, *flags)), "--output_dir", str(tmp_path / name)]
        train_main(command)
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return next(record for record in history if "loss" in record)

    plain = first_record("plain")
    smoothed = first_record("smoothed", "--preference_label_smoothing", 0.25)
    # -(1 - e) log s(z) - e log s(-z) = -log s(z) + e z
    assert smoothed["loss"] == pytest.approx(plain["loss"] + 0.25 * plain["margin"], rel=1e-5)
    margins = first_record("margins", "--margin_column", "margin_mean")
    assert margins["preference_loss"] > plain["preference_loss"] + 0.1
    flipped = first_record("flipped", "--flip_fraction", 1.0)
    assert flipped["margin"] == pytest.approx(-plain["margin"], rel=1e-5)
    confident = first_record("confident", "--confidence_weight", 0.5, "--confidence_warmup", 0)
    assert confident["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    # A run without margins can be run again from what it left, which names the column.
    again = first_record("again", "--config", tmp_path / "plain" / "run.yaml")
    assert again["loss"] == plain["loss"]
    for named in (("--margin_column", "other"), ("--margin_labels", "llama2_large")):
        with pytest.raises(SystemExit) as ending:
            first_record("none", *named)
        assert ending.value.code == 2
        assert not (tmp_path / "none").exists()


def test_margins_keep_their_dtype_under_deepspeed_in_half_precision(tmp_path, train, student_path, pairs_path):
    """transformers would round them to bfloat16: 100.3 and 100.4 would be one."""
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for index, line in enumerate(pairs_path.read_text().splitlines()):
            file.write(json.dumps({**json.loads(line), "margin": 100.3 + index / 1000}) + "\n")
    flags = ("--model_name_or_path", student_path, "--dataset_name", path, "--alpha", 0, "--bf16", "true")
    flags = (*flags, "--max_steps", 1, "--learning_rate", 0, "--per_device_train_batch_size", 48, "--logging_steps", 1)
    run = train(tmp_path / "out", *flags, "--save_strategy", "no", "--deepspeed", "ds_zero3.json")
    assert run.returncode == 0, run.errors
    (record,) = run.records
    # Far from 0, the loss is the margin less the difference.
    mean = 100.3 + sum(range(48)) / 48 / 1000
    assert record["preference_loss"] + record["margin"] == pytest.approx(mean, abs=2e-3)


def test_the_confidence_term_changes_training(make_trainer):
    def losses(**values):
        trainer = make_trainer(alpha=0, max_steps=6, prepare=lambda pairs: draw_pair_order(pairs, 0), **values)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    plain = losses()
    confident = losses(preference_loss=PreferenceLoss(confidence_weight=0.5, confidence_warmup=0.0))
    assert plain != pytest.approx(confident, rel=1e-3)


def test_a_run_with_a_bottleneck_goes_on_from_its_checkpoint(make_trainer, tmp_path):
    def trainer(**values):
        return make_trainer(alpha=0, bottleneck=(8, "paper"), bottleneck_weight=0.1, max_steps=6, **values)

    whole = trainer()
    whole.train()
    folder = str(tmp_path / "parts")
    saving = {"save_strategy": "steps", "save_steps": 3, "output_dir": folder}
    trainer(**saving).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    resumed = trainer(**saving)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0)


def test_the_best_checkpoint_is_loaded_with_its_bottleneck(make_trainer):
    trainer = make_trainer(
        alpha=0,
        bottleneck=(8, "paper"),
        max_steps=4,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_preference_loss",
        greater_is_better=False,
    )
    trainer.train()
    losses = [
        record["eval_preference_loss"] for record in trainer.state.log_history if "eval_preference_loss" in record
    ]
    assert trainer.evaluate()["eval_preference_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_what_is_saved_is_a_plain_classifier_of_the_evaluations_rewards(make_trainer, tmp_path):
    trainer = make_trainer(alpha=0, bottleneck=(128, "paper"), bottleneck_weight=0.1, max_steps=2)
    trainer.train()
    trainer.save_model()
    saved = tmp_path / "out"
    assert [name for name in load_file(saved / "model.safetensors") if name.startswith("score")] == ["score.weight"]
    rows = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    evaluated = rows[:, [COLUMNS.index("chosen_reward"), COLUMNS.index("rejected_reward")]].float().T
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset))])
    with torch.no_grad():
        rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.view(2, -1)
    torch.testing.assert_close(rewards, evaluated, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def judged_pairs_path(tmp_path_factory, pairs_path):
    """The training pairs with columns as `idrm margins` writes them."""
    path = tmp_path_factory.mktemp("judged") / "pairs.jsonl"
    records = [json.loads(line) for line in pairs_path.read_text().splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            file.write(json.dumps({**record, "margin_mean": index / 16 - 0.5, "margin_deviation": 0.1}) + "\n")
    return path


ALL = (
    *("--margin_column", "margin_mean", "--flip_fraction", 0.2, "--preference_label_smoothing", 0.1),
    *("--confidence_weight", 0.5, "--inform_latent_size", 16),
)


def test_two_ranks_under_zero3_train_and_save_it(
    tmp_path, train, student_path, teacher_path, judged_pairs_path, eval_pairs_path
):
    flags = (
        *("--model_name_or_path", student_path, "--teacher_name_or_path", teacher_path),
        *("--dataset_name", judged_pairs_path, "--eval_dataset_name", eval_pairs_path, *ALL),
        *("--max_steps", 6, "--logging_steps", 2, "--learning_rate", "1e-3", "--per_device_train_batch_size", 4),
        *("--save_strategy", "steps", "--save_steps", 4),
    )
    run = train(tmp_path / "out", "--deepspeed", "ds_zero3.json", *flags, ranks=2)
    assert run.returncode == 0, run.errors
    assert "labels flipped: 9 of 48 pairs, of the lowest strength, up to 0.0000" in run.errors
    for record in run.records:
        assert record["loss"] == pytest.approx(
            record["preference_loss"] + record["interaction_loss"] + 0.1 * record["latent_kl"], rel=1e-4
        )
    names = [name for name in load_file(run.folder / "model.safetensors") if name.startswith("score")]
    assert names == ["score.weight"]
    assert "score.mean.weight" in load_file(run.folder / "checkpoint-4" / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    rewards = []
    for pair in load_preferences(str(eval_pairs_path))[0]:
        for user, assistant in (pair["chosen"], pair["rejected"]):
            text = f"\n\nHuman: {user['content']}\n\nAssistant: {assistant['content']}</s>"
            with torch.no_grad():
                rewards.append(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits)
    chosen, rejected = torch.cat(rewards).view(-1, 2).T
    assert run.results["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert run.results["eval_mean_reward"] == pytest.approx(torch.cat(rewards).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preference_label_smoothing", "0.5"], "--preference_label_smoothing: expected less than 0.5"),
        (["--flip_fraction", "1.5"], "--flip_fraction: expected at most 1"),
        (["--flip_fraction", "-0.1"], "--flip_fraction"),
        (["--confidence_weight", "1"], "--confidence_weight: expected less than 1"),
        (["--confidence_warmup", "0.5"], "--confidence_warmup 0.5: does nothing without --confidence_weight"),
        (["--flip_column", "other"], "--flip_column other: does nothing without --flip_fraction"),
        (["--inform_kl", "official"], "--inform_kl official: does nothing without --inform_latent_size"),
        (["--inform_latent_size", "0"], "--inform_latent_size"),
        (["--margin_labels", "good"], "--margin_labels good: expected label=number"),
        (
            ["--confidence_weight", "0.5", "--per_device_train_batch_size", "1"],
            "--confidence_weight 0.5: compares the pairs of a batch",
        ),
    ],
)
def test_what_would_do_nothing_or_has_no_meaning_is_refused(flags, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        parse_arguments(["--model_name_or_path", "m", "--dataset_name", "d", "--alpha", "0", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--margin_column", "margins"], "--margin_column margins: no pair of .* has a value in it"),
        (["--flip_fraction", "0.2"], "--flip_fraction: no training pair has a value in --flip_column"),
    ],
)
def test_a_column_that_no_pair_has_is_refused(tmp_path, student_path, pairs_path, flags, message):
    model_and_data = ["--model_name_or_path", str(student_path), "--dataset_name", str(pairs_path), "--alpha", "0"]
    where = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    with pytest.raises(InputError, match=message):
        train_model(parse_arguments([*model_and_data, *where, *flags]))
    assert not (tmp_path / "out").exists()
