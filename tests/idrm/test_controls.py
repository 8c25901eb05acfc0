"""Control experiments: a teacher that attends uniformly, and one that reads another pair."""

import itertools
import json

import pytest
import torch

from idrm.alignment import PairEncoder, encode_preferences, exchange_teacher_texts
from idrm.arguments import parse_arguments
from idrm.capture import Teacher
from idrm.capture.uniform import UniformTeacher
from idrm.collator import PairCollator
from idrm.errors import InputError
from idrm.preference import load_preferences
from idrm.train import main
from idrm_kernels import attention_map_rows


@pytest.fixture(scope="module")
def pairs(student_tokenizer, teacher_tokenizer, pairs_path):
    encoder = PairEncoder(student_tokenizer, teacher_tokenizer, max_length=128, teacher_max_length=128)
    return encode_preferences(load_preferences(str(pairs_path))[0], encoder)[0]


def read_tokens(pair) -> list[list[int]]:
    """Per segment the ids that the teacher reads of it."""
    return [[pair["teacher_input_ids"][place] for place in places] for places in pair["teacher_places"]]


def test_another_pairs_tokens_are_read_in_the_place_of_each(pairs):
    exchanged = exchange_teacher_texts(pairs)
    donors = [read_tokens(pair) for pair in pairs]
    for before, after in zip(pairs, exchanged, strict=True):
        assert after["teacher_reading"] != before["teacher_reading"]
        changed = {"teacher_input_ids", "teacher_reading"}
        assert {name: value for name, value in after.items() if name not in changed} == {
            name: value for name, value in before.items() if name not in changed
        }
        taking_part = set(itertools.chain(*before["teacher_places"]))
        for place, (old, new) in enumerate(zip(before["teacher_input_ids"], after["teacher_input_ids"], strict=True)):
            assert place in taking_part or old == new  # [CLS] and [SEP] stay
        # Each comes from one other pair, whole, cut or repeated.
        segments = read_tokens(after)
        assert segments != read_tokens(before)
        assert any(
            all(
                ours == (theirs * (1 + len(ours) // len(theirs)))[: len(ours)]
                for ours, theirs in zip(segments, donor, strict=True)
            )
            for donor in donors
        )
    assert len({json.dumps(read_tokens(pair)) for pair in exchanged}) > 0.9 * len(pairs)  # not all the same one


def test_one_pair_has_no_other(pairs):
    with pytest.raises(InputError, match="needs two pairs with units at least, found 1"):
        exchange_teacher_texts(pairs.select([0]))


def test_uniform_maps(pairs, student_tokenizer, teacher_path):
    teacher = Teacher.load(str(teacher_path), layers=(-1, 0))
    collator = PairCollator(student_tokenizer, teacher.tokenizer)
    inputs = collator([pairs[0], pairs[1]])["interaction"]
    blocks = UniformTeacher(teacher).attention(inputs)
    assert len(blocks) == 2
    own_units = pairs[0]["num_units"][0]
    sizes = torch.bincount(torch.tensor(pairs[0]["teacher_units"][0]), minlength=own_units)
    (row,) = attention_map_rows(blocks[0], inputs.layout, [1], teacher_side=True)
    torch.testing.assert_close(row[0][:own_units], sizes / sizes.sum())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--alpha 0 --teacher_control uniform", "--alpha 0 has no teacher"),
        ("--teacher_name_or_path t --teacher_control uniform --teacher_cache c", "runs no teacher"),
        ("--teacher_name_or_path t --teacher_control other_pair --teacher_long_inputs windows", "in one input"),
        ("--teacher_name_or_path t --teacher_control none", None),
    ],
)
def test_flags_that_contradict_a_control(flags, message):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", *flags.split()]
    if message is None:
        assert parse_arguments(flags).data.teacher_control == "none"
        return
    with pytest.raises(InputError, match=message):
        parse_arguments(flags)


@pytest.mark.parametrize("control", ["uniform", "other_pair"])
def test_a_control_trains(tmp_path, student_path, teacher_path, pairs_path, control):
    flags = f"--model_name_or_path {student_path} --teacher_name_or_path {teacher_path} --dataset_name {pairs_path}"
    flags += f" --teacher_control {control} --max_steps 2 --per_device_train_batch_size 4 --save_strategy no"
    flags += f" --logging_steps 1 --use_cpu true --disable_tqdm true --output_dir {tmp_path}"
    main(flags.split())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all(record["interaction_loss"] > 0 for record in history if "loss" in record)
