"""RewardTrainer against formulas and loops written out by hand, in this process."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm.alignment import PairEncoder
from idrm.metrics import COLUMNS
from idrm.preference import load_preferences
from idrm_kernels import available_implementations


def training_records(trainer):
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def batch_of(trainer, pairs=4):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(pairs)]))


def same(
    records, others, names=("loss", "grad_norm", "preference_loss", "accuracy", "margin", "mean_reward"), rel=1e-5
):
    assert len(records) == len(others) > 0
    for record, other in zip(records, others, strict=True):
        for name in names:
            assert record[name] == pytest.approx(other[name], rel=rel, abs=1e-6), name


def test_without_alpha_it_is_a_plain_bradley_terry_loop(make_trainer, student_path, pairs_path):
    """A loop that shares nothing with the trainer but the model and the file."""
    trainer = make_trainer(alpha=0, per_device_train_batch_size=48, max_steps=5)
    records = training_records(trainer)

    tokenizer = AutoTokenizer.from_pretrained(student_path)
    model = AutoModelForSequenceClassification.from_pretrained(student_path)
    dialogues = load_preferences(str(pairs_path))[0]
    texts = []
    for side in ("chosen", "rejected"):
        for user, assistant in dialogues[side]:
            texts.append(f"<s>\n\nHuman: {user['content']}\n\nAssistant: {assistant['content']}</s>")
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for record in records:
        rewards = model(**inputs).logits.squeeze(-1)
        chosen, rejected = rewards[:48], rewards[48:]
        loss = -torch.log(torch.sigmoid(chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["preference_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert record["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
        assert record["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-6)
        assert "interaction_loss" not in record
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_preference_loss_is_that_of_trl(make_trainer):
    """TRL's RewardTrainer: margin, and the centring of rewards."""
    trainer = make_trainer(alpha=0, center_rewards_coefficient=0.01)
    batch = batch_of(trainer)
    batch["margin"] = torch.tensor([0.0, 0.5, 1.0, -0.3])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rewards_chosen, rewards_rejected = torch.chunk(logits.squeeze(-1), chunks=2)
    expected = -logsigmoid(rewards_chosen - rewards_rejected - batch["margin"]).mean()
    expected += 0.01 * torch.mean((rewards_chosen + rewards_rejected) ** 2)
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_the_preference_loss_plus_alpha_times_the_interaction_loss(make_trainer):
    records = training_records(make_trainer(alpha=0.3, max_steps=3))
    for record in records:
        assert record["loss"] == pytest.approx(record["preference_loss"] + 0.3 * record["interaction_loss"], rel=1e-5)
        assert record["interaction_loss"] == pytest.approx(record["intra_loss"] + record["inter_loss"], rel=1e-5)


def test_weights_of_intra_and_inter_blocks(make_trainer):
    trainer = make_trainer(alpha=1, interaction={"intra_weight": 2.0, "inter_weight": 0.5})
    metrics = trainer.evaluate()
    expected = 2 * metrics["eval_intra_loss"] + 0.5 * metrics["eval_inter_loss"]
    assert metrics["eval_interaction_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("top", [-1, -2, 0])
def test_the_interaction_loss_moves_parameters_up_to_the_supervised_blocks_queries_and_keys(make_trainer, top):
    trainer = make_trainer(student_layers=[top])
    batch = batch_of(trainer)
    trainer.model.train()
    _, student = trainer._forward(trainer.model, batch)
    inputs = batch["interaction"]
    trainer.interaction.batch_loss(student, trainer.interaction.teacher_attention(inputs), inputs).loss.backward()
    top = top % 3
    for name, parameter in trainer.model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        at_the_top = layer == top and any(part in name for part in ("q_proj", "k_proj", "input_layernorm"))
        below = ("embed_tokens" in name) or 0 <= layer < top
        moves = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moves == (below or at_the_top), name


def test_no_gradient_reaches_the_teacher_and_it_is_not_trained(make_trainer):
    trainer = make_trainer(max_steps=1)
    teacher = trainer.interaction.teacher._model
    before = copy.deepcopy(teacher.state_dict())
    trainer.train()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_evaluation_is_a_mean_over_pairs_whatever_the_batch_size(make_trainer):
    results = [make_trainer(per_device_eval_batch_size=size).evaluate() for size in (1, 3, 4, 11, 16)]
    names = [name for name in results[0] if not name.endswith(("runtime", "second", "time"))]
    assert {"eval_accuracy", "eval_interaction_ratio", "eval_reward_length_correlation", "eval_pairs"} <= set(names)
    assert results[0]["eval_pairs"] == 11
    for other in results[1:]:
        assert {name: other[name] for name in names} == pytest.approx(
            {name: results[0][name] for name in names}, rel=1e-5
        )


@pytest.mark.parametrize("reduction", ["frobenius", "row", "row_sq"])
@pytest.mark.parametrize("rows", ["all", "response"])
def test_losses_of_pairs_average_to_the_loss_of_the_batch(make_trainer, reduction, rows):
    trainer = make_trainer(
        interaction={"reduction": reduction, "interaction_rows": rows, "num_head_groups": 2},
        student_layers=[-1, 0],
        teacher_layers=[-1, -2],
    )
    batch = batch_of(trainer, pairs=5)
    with torch.no_grad():
        _, student = trainer._forward(trainer.model, batch)
        inputs = batch["interaction"]
        teacher = trainer.interaction.teacher_attention(inputs)
        whole = trainer.interaction.batch_loss(student, teacher, inputs)
        pairs = trainer.interaction.pair_losses(student, teacher, inputs)
    for mean, values in zip(whole, pairs, strict=True):
        assert values.shape == (5,)
        torch.testing.assert_close(values.mean(), mean, rtol=1e-5, atol=1e-6)


def test_the_ratio_of_a_student_that_attends_uniformly_is_one(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.model.layers[-1].self_attn.q_proj.weight.zero_()
    assert trainer.evaluate()["eval_interaction_ratio"] == pytest.approx(1.0, rel=1e-5)


def test_a_pair_without_units_contributes_nothing(make_trainer):
    trainer = make_trainer()
    pairs = [dict(trainer.train_dataset[index]) for index in range(2)]
    for name in ("student_positions", "student_units", "teacher_positions", "teacher_units", "teacher_places"):
        pairs[1][name] = [[], []]
    pairs[1]["num_units"] = pairs[1]["response_units"] = [0, 0]
    losses = []
    for chosen in (pairs, pairs[:1]):
        batch = trainer.data_collator(chosen)
        with torch.no_grad():
            _, student = trainer._forward(trainer.model, batch)
            teacher = trainer.interaction.teacher_attention(batch["interaction"])
            losses.append(trainer.interaction.batch_loss(student, teacher, batch["interaction"]).loss)
    torch.testing.assert_close(2 * losses[0], losses[1])


@pytest.mark.parametrize("alpha", [0, 1])
def test_accumulated_micro_batches_are_one_batch(make_trainer, alpha):
    whole = training_records(make_trainer(alpha=alpha, per_device_train_batch_size=8, max_steps=4))
    parts = make_trainer(alpha=alpha, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4)
    same(whole, training_records(parts), rel=1e-4)


def test_a_record_covers_all_steps_since_the_last(make_trainer):
    each = training_records(make_trainer(max_steps=6, per_device_train_batch_size=8))
    thirds = training_records(make_trainer(max_steps=6, per_device_train_batch_size=8, logging_steps=3))
    for index, record in enumerate(thirds):
        for name in ("loss", "interaction_loss", "accuracy", "margin", "mean_reward"):
            mean = sum(other[name] for other in each[3 * index : 3 * index + 3]) / 3
            assert record[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert record["interaction_ratio"] == pytest.approx(each[3 * index + 2]["interaction_ratio"], rel=1e-5)


def test_activation_checkpointing_changes_nothing(make_trainer):
    plain = training_records(make_trainer(max_steps=3))
    checkpointed = make_trainer(max_steps=3, gradient_checkpointing=True)
    same(plain, training_records(checkpointed), names=("loss", "grad_norm", "interaction_loss"))
    assert checkpointed.model.is_gradient_checkpointing


def test_compiling_the_student_changes_nothing(make_trainer):
    compiled = training_records(make_trainer(max_steps=3, torch_compile=True, torch_compile_backend="aot_eager"))
    same(compiled, training_records(make_trainer(max_steps=3)))


def test_padding_on_the_left_changes_nothing(make_trainer):
    right = training_records(make_trainer(max_steps=3))
    left = training_records(make_trainer(max_steps=3, padding_side="left"))
    same(right, left, names=("loss", "grad_norm", "interaction_loss", "preference_loss"), rel=1e-4)


def test_half_precision_trains(make_trainer):
    exact = training_records(make_trainer(max_steps=2))
    half = training_records(make_trainer(max_steps=2, bf16=True))
    for name in ("preference_loss", "interaction_loss"):
        assert half[0][name] == pytest.approx(exact[0][name], rel=0.05)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_saved_model_gives_the_rewards_of_evaluation(make_trainer, tmp_path, eval_pairs_path, side):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    rows = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    evaluated = rows[:, [COLUMNS.index("chosen_reward"), COLUMNS.index("rejected_reward")]].float()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    texts = []
    for pair in load_preferences(str(eval_pairs_path))[0]:
        for user, assistant in (pair["chosen"], pair["rejected"]):
            texts.append(f"\n\nHuman: {user['content']}\n\nAssistant: {assistant['content']}</s>")
    with torch.no_grad():
        batch = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
        alone = [model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits for t in texts]
    torch.testing.assert_close(batch.view(-1, 2), evaluated, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(alone).view(-1, 2), evaluated, rtol=0, atol=1e-5)


def test_each_evaluation_set_keeps_its_name_and_can_choose_the_best_checkpoint(make_trainer):
    trainer = make_trainer(
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_far_accuracy",
    )
    trainer.eval_dataset = {"near": trainer.eval_dataset, "far": trainer.train_dataset.select(range(7))}
    trainer.train()
    evaluated = {key: value for record in trainer.state.log_history for key, value in record.items()}
    assert evaluated["eval_near_pairs"] == 11
    assert evaluated["eval_far_pairs"] == 7
    accuracies = [record["eval_far_accuracy"] for record in trainer.state.log_history if "eval_far_accuracy" in record]
    assert trainer.state.best_metric == max(accuracies)


def test_grouping_by_length_needs_no_labels(make_trainer):
    trainer = make_trainer(max_steps=2, train_sampling_strategy="group_by_length")
    trainer.train_dataset = trainer.train_dataset.add_column(
        "length", [len(ids) for ids in trainer.train_dataset["chosen_input_ids"]]
    )
    assert len(training_records(trainer)) == 2


def test_rewards_longer_than_the_teacher_reads_still_train(make_trainer):
    """Cut units leave the map of both; the sequences are trained on whole."""
    trainer = make_trainer(max_steps=1)
    encoder = PairEncoder(
        trainer.processing_class, trainer.interaction.teacher.tokenizer, max_length=128, teacher_max_length=24
    )
    pair = trainer.train_dataset[0]
    record = {"conversational": True, "margin": None}
    for side in ("chosen", "rejected"):
        words = " ".join(["the kettle boils"] * 12)
        record[side] = [{"role": "user", "content": words}, {"role": "assistant", "content": f"seven {side} lamp"}]
    cut = encoder(record)
    assert cut["cut_teacher"]
    batch = trainer.data_collator([cut, pair])
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))
    assert dataclasses.is_dataclass(batch["interaction"])


def test_every_kernel_trains_alike(make_trainer):
    """The default and every other implementation that runs here: the losses of the one that materialises the maps."""
    options = {"student_layers": (-1, -2), "teacher_layers": (-1, -2)}
    options |= {"per_device_train_batch_size": 2, "max_steps": 2}
    names = ("loss", "grad_norm", "interaction_loss", "intra_loss", "inter_loss", "interaction_ratio")
    expected = training_records(make_trainer(interaction={"kernel_impl": "reference"}, **options))
    for impl in ("auto", *available_implementations()):
        records = training_records(make_trainer(interaction={"kernel_impl": impl}, **options))
        same(records, expected, names, rel=1e-4)


def test_a_checkpoint_is_complete_once_its_trainer_state_is_there(make_trainer, tmp_path, monkeypatch):
    """Ranks wait for one another between their own files, written by then, and the trainer state."""
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    seen = []
    wait_for_everyone = trainer.accelerator.wait_for_everyone

    def waiting():
        seen.append({path.name for path in tmp_path.glob("out/checkpoint-1/*")})
        wait_for_everyone()

    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", waiting)
    trainer.train()
    ranks_files = {"rng_state.pth", "metric_sums_0.json"}
    assert any(ranks_files <= names and "trainer_state.json" not in names for names in seen)
    assert "trainer_state.json" in {path.name for path in tmp_path.glob("out/checkpoint-1/*")}


def test_with_a_cache_a_second_epoch_runs_no_teacher_and_gives_the_same_losses(make_trainer, tmp_path):
    """Bit for bit: the weights stand still at a learning rate of 0, and the pairs come in the same order."""
    values = {"learning_rate": 0.0, "train_sampling_strategy": "sequential", "dataloader_num_workers": 1}
    trainer = make_trainer(cache_folder=tmp_path / "cache", num_train_epochs=2, **values)
    records = training_records(trainer)
    first, second = records[: len(records) // 2], records[len(records) // 2 :]
    cached = trainer.interaction.teacher
    assert (cached.computed, cached.found) == (48, 48)
    names = ("loss", "interaction_loss", "intra_loss", "inter_loss", "interaction_ratio", "grad_norm")
    for ours, theirs in zip(first, second, strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
    live = training_records(make_trainer(**values))
    for ours, theirs in zip(first, live, strict=True):
        assert ours["interaction_loss"] == pytest.approx(theirs["interaction_loss"], rel=2e-3)
        assert ours["interaction_loss"] != theirs["interaction_loss"]  # passed through bfloat16


def test_a_damaged_entry_changes_nothing_but_one_recomputation(make_trainer, tmp_path, caplog):
    trainer = make_trainer(cache_folder=tmp_path / "cache")
    cached = trainer.interaction.teacher
    metrics = trainer.evaluate()
    assert (cached.computed, cached.found) == (11, 0)
    entry = next((tmp_path / "cache").glob("*/*.safetensors"))
    content = entry.read_bytes()
    entry.write_bytes(content[:100] + content[101:])
    again = trainer.evaluate()
    assert (cached.computed, cached.found) == (12, 10)
    assert caplog.text.count("is damaged") == 1
    assert entry.read_bytes() == content
    last = trainer.evaluate()
    assert (cached.computed, cached.found) == (12, 21)
    for name in metrics.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
        assert metrics[name] == again[name] == last[name], name
