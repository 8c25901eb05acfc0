"""The entry point in processes of its own: ranks, ZeRO-3, saving, being killed and going on."""

import json
import os
import signal
import time

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm.preference import load_preferences

ZERO3 = ("--deepspeed", "ds_zero3.json")
SHARED = ("--share_prompt", "on", "--activation_checkpointing", "true")


@pytest.fixture(scope="session")
def flags(student_path, teacher_path, pairs_path, eval_pairs_path):
    """Eighteen steps of four pairs: one and a half epochs of the 48."""
    return (
        *("--model_name_or_path", student_path, "--teacher_name_or_path", teacher_path),
        *("--dataset_name", pairs_path, "--eval_dataset_name", f"near={eval_pairs_path}"),
        *("--max_steps", 18, "--logging_steps", 3, "--learning_rate", "1e-3"),
        *("--save_strategy", "steps", "--save_steps", 4, "--save_total_limit", 2),
    )


@pytest.fixture(scope="session")
def plain(tmp_path_factory, train, flags):
    """One plain process, in two rows a pair."""
    reading = ("--share_prompt", "off", "--per_device_train_batch_size", 4)
    return train(tmp_path_factory.mktemp("plain") / "out", *flags, *reading)


@pytest.fixture(scope="session")
def zero3(tmp_path_factory, train, flags):
    """The same run at two ranks under ZeRO-3, each prompt read once, activations checkpointed."""
    folder = tmp_path_factory.mktemp("zero3") / "out"
    return train(folder, *ZERO3, *SHARED, *flags, "--per_device_train_batch_size", 2, ranks=2)


def weights(run):
    return AutoModelForSequenceClassification.from_pretrained(run.folder).state_dict()


def test_a_plain_process_trains_saves_and_reports(plain):
    assert plain.returncode == 0, plain.errors
    names = {path.name for path in plain.folder.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "all_results.json"}
    assert expected | {"train_results.json", "eval_near_results.json", "checkpoint-18"} <= names
    assert not {name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))}
    assert not (plain.folder / "checkpoint-18" / "training_args.bin").exists()
    assert plain.errors.rstrip().splitlines()[-1] == f"The reward model is in {plain.folder}"
    assert yaml.safe_load((plain.folder / "run.yaml").read_text())["max_steps"] == 18
    assert plain.results["eval_near_pairs"] == 11
    for record in plain.records:
        for name in ("preference_loss", "interaction_loss", "intra_loss", "inter_loss", "interaction_ratio"):
            assert record[name] > 0
        for name in ("accuracy", "margin", "mean_reward", "reward_length_correlation"):
            assert name in record
    assert plain.records[-1]["interaction_loss"] < plain.records[0]["interaction_loss"]


def test_two_ranks_under_zero3_are_one_plain_process(plain, zero3):
    assert zero3.returncode == 0, zero3.errors
    assert len(plain.records) == len(zero3.records) == 6
    for ours, theirs in zip(zero3.records, plain.records, strict=True):
        for name in theirs.keys() - {"epoch", "step"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name, value in plain.results.items():
        if name.startswith("eval_near") and not name.endswith(("runtime", "per_second")):
            assert zero3.results[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(zero3)[name], weight, rtol=1e-3, atol=1e-4)


def test_the_model_saved_under_zero3_gives_the_rewards_of_evaluation(zero3, eval_pairs_path):
    tokenizer = AutoTokenizer.from_pretrained(zero3.folder)
    model = AutoModelForSequenceClassification.from_pretrained(zero3.folder)
    rewards = []
    for pair in load_preferences(str(eval_pairs_path))[0]:
        for user, assistant in (pair["chosen"], pair["rejected"]):
            text = f"\n\nHuman: {user['content']}\n\nAssistant: {assistant['content']}</s>"
            with torch.no_grad():
                rewards.append(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits)
    rewards = torch.cat(rewards).view(-1, 2)
    assert zero3.results["eval_near_mean_reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert zero3.results["eval_near_margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-5)
    assert zero3.results["eval_near_accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).float().mean().item())


def test_a_killed_run_goes_on_to_the_weights_and_records_of_an_unbroken_one(
    tmp_path, train, start_training, flags, zero3
):
    folder = tmp_path / "out"
    flags = (*ZERO3, *SHARED, *flags, "--per_device_train_batch_size", 2)
    process = start_training(folder, *flags, ranks=2, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "all_results.json").exists()
    # What a run killed while it saves leaves behind: the highest number, without a trainer state.
    (folder / "checkpoint-17").mkdir()

    resumed = train(folder, *flags, "--resume_from_checkpoint", ranks=2)
    assert resumed.returncode == 0, resumed.errors
    expected = weights(zero3)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    for ours, theirs in zip(resumed.records, zero3.records, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def test_bad_input_at_two_ranks_is_one_line_and_status_2(tmp_path, train, flags):
    run = train(tmp_path / "out", *ZERO3, *flags, "--num_head_groups", "3", ranks=2)
    assert run.returncode == 2
    lines = [line for line in run.errors.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: --num_head_groups 3: must divide the heads of both models, 4 of the student and 2 of the teacher"
    ]
    assert not (tmp_path / "out").exists()


def test_a_pad_token_is_added_under_zero3(tmp_path, train, flags, student_path):
    student = tmp_path / "student"
    student.mkdir()
    for path in student_path.iterdir():
        content = path.read_bytes()
        if path.name.startswith("tokenizer"):
            content = content.replace(b"<|pad|>", b"<|unused|>")
        (student / path.name).write_bytes(content)
    config = json.loads((student / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (student / "tokenizer_config.json").write_text(json.dumps(config))
    changed = ("--model_name_or_path", student, "--max_steps", 2, "--alpha", 0, "--save_strategy", "no")
    run = train(tmp_path / "out", *ZERO3, *flags, *changed, ranks=2)
    assert run.returncode == 0, run.errors
    assert run.errors.count("which is added to the vocabulary") == 1
    rows = json.loads((student / "config.json").read_text())["vocab_size"]
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert model.get_input_embeddings().weight.shape[0] == rows + 1
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(run.folder).pad_token_id == rows


def test_two_ranks_fill_a_cache_and_a_later_run_needs_no_teacher(tmp_path, train, flags):
    """Read in windows and in a drawn order, which the later run draws alike.

    Micro-batches are made by tokens: twelve of 3 to 5 pairs, whether two ranks take them or one process by twos.
    """
    reading = ("--teacher_max_length", 40, "--teacher_long_inputs", "windows", "--teacher_segment_order", "random")
    changed = ("--teacher_cache", tmp_path / "cache", *reading, "--max_steps", 6, "--save_strategy", "no")
    changed = (*changed, "--tokens_per_batch", 234)
    first = train(tmp_path / "first", *ZERO3, *flags, *changed, ranks=2)
    assert first.returncode == 0, first.errors
    assert first.errors.count("of up to 234 tokens: 12 an epoch, of 3 to 5 pairs, 4.0 in the mean, 85% full") == 1
    assert "59 pairs as maps take" in first.errors
    assert "; 0 of them are there" in first.errors
    assert "read in windows" in first.errors
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 59
    later = train(tmp_path / "later", *flags, *changed, "--gradient_accumulation_steps", 2)
    assert later.returncode == 0, later.errors
    assert "59 of them are there" in later.errors
    assert "59 came from it and 0 from the teacher" in later.errors
    for ours, theirs in zip(later.records, first.records, strict=True):
        for name in theirs.keys() - {"epoch", "step"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name, weight in weights(first).items():
        torch.testing.assert_close(weights(later)[name], weight, rtol=1e-3, atol=1e-4)
