"""The tiny NLI teacher: learns its sample from matching, loads with from_pretrained, trains alike on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm.capture import Teacher
from idrm.embedded.generator import NLI_LABELS, VALUES_OF_KEY, Sizes, write_data
from idrm.embedded.stages import TEACHER_METRICS_FILE
from idrm.embedded.teacher import Recipe, encode, make_model, train, train_and_save, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = Recipe(hidden_size=32, num_heads=2, batch_size=16, max_steps=4, report_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, seed=0, sizes=Sizes(train=8, evaluation=4, nli_train=600, nli_dev=60))
    return folder


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "teacher"
    return folder, train_and_save(data, folder, seed=0, recipe=SMALL)


def test_it_is_saved_whole_with_its_labels_and_metrics(saved):
    folder, metrics = saved
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert [model.config.id2label[index] for index in range(3)] == list(NLI_LABELS)
    assert AutoTokenizer.from_pretrained(folder).is_fast
    assert json.loads((folder / TEACHER_METRICS_FILE).read_text()) == metrics
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


def test_it_is_a_teacher_that_can_be_captured(saved, caplog):
    teacher = Teacher.load(str(saved[0]), layers=[-2])
    assert teacher.max_length == SMALL.max_length
    assert not caplog.records, "a warning that it is no NLI classifier"


def test_every_value_is_known_to_the_tokenizer(data):
    texts = [f"{key}: {value}." for key, values in VALUES_OF_KEY.items() for value in values]
    tokenizer = train_tokenizer(texts, SMALL)
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)


def test_equal_tokens_attend_to_each_other_before_any_training():
    torch.manual_seed(0)
    model = make_model(300, Recipe()).eval()
    tokens = torch.randperm(290)[None, :20] + 4
    tokens = torch.cat([tokens, tokens[:, :1]], dim=1)
    model.set_attn_implementation("eager")
    first_block = model(tokens, output_attentions=True).attentions[0].mean(1)[0]
    others = first_block[20, 1:20]
    assert first_block[20, 0] > 5 * others.mean()


def test_training_lowers_the_loss_and_stops_when_it_is_low(data):
    recipe = Recipe(hidden_size=32, num_heads=2, batch_size=24, max_steps=60, report_every=20, loss_to_stop=1.0)
    records = [
        {"premise": f"Day: {day}.", "hypothesis": "Day: Monday.", "label": label}
        for day, label in (("Monday", "entailment"), ("Sunday", "contradiction"))
    ]
    tokenizer = train_tokenizer([record["premise"] for record in records], recipe)
    torch.manual_seed(0)
    model = make_model(len(tokenizer), recipe)
    steps, loss = train(model, *encode(tokenizer, records), recipe, seed=0)
    assert loss < 1.0
    assert steps < recipe.max_steps


def test_two_ranks_train_the_same_teacher(data, tmp_path):
    def weights(world_size: int) -> dict[str, torch.Tensor]:
        folder = tmp_path / f"ranks_{world_size}"
        command = [sys.executable, "-m", "idrm.embedded.teacher", "--data_folder", str(data), "--max_steps", "1"]
        command += ["--output_dir", str(folder)]
        port = str(20000 + os.getpid() % 9000)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
        environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=tmp_path)
            for rank in range(world_size)
        ]
        assert [process.wait(timeout=200) for process in processes] == [0] * world_size
        return load_file(folder / "model.safetensors")

    alone, together = weights(1), weights(2)
    # Adam's first step has the size of the learning rate whatever the gradient: where that is all rounding, its sign is
    # chance. Another batch, or another share of it, would move nearly every weight elsewhere.
    differing = sum(int(((together[name] - weight).abs() > 1e-4).sum()) for name, weight in alone.items())
    assert differing < 0.02 * sum(weight.numel() for weight in alone.values())
