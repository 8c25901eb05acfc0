"""The padded batch and its packed indices."""

import copy

import pytest
import torch

from idrm.alignment import PairEncoder
from idrm.collator import PairCollator, shared_prefix_len

RECORDS = [
    {
        "chosen": [{"role": "user", "content": "the kettle"}, {"role": "assistant", "content": chosen}],
        "rejected": [{"role": "user", "content": "the kettle"}, {"role": "assistant", "content": rejected}],
        "conversational": True,
        "margin": margin,
    }
    for chosen, rejected, margin in (
        ("boils quickly please", "is green", None),
        ("seven", "the river reads twelve mountain café", 0.5),
    )
]


@pytest.fixture
def encoded(student_tokenizer, teacher_tokenizer):
    encoder = PairEncoder(student_tokenizer, teacher_tokenizer, max_length=64, teacher_max_length=64)
    return [encoder(record) for record in RECORDS]


def test_indices_point_at_the_tokens_that_take_part(encoded, student_tokenizer, teacher_tokenizer):
    batch = PairCollator(student_tokenizer, teacher_tokenizer)(encoded)
    inputs = batch["interaction"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 2 * len(encoded)
    student = batch["input_ids"].flatten()[inputs.student_index].tolist()
    teacher = inputs.teacher_input_ids.flatten()[inputs.teacher_index].tolist()
    expected_student, expected_teacher, expected_positions = [], [], []
    for pair in encoded:
        for segment, name in enumerate(("chosen_input_ids", "rejected_input_ids")):
            expected_student += [pair[name][position] for position in pair["student_positions"][segment]]
            expected_teacher += [pair["teacher_input_ids"][position] for position in pair["teacher_positions"][segment]]
            expected_positions += pair["teacher_positions"][segment]
    assert student == expected_student
    assert teacher == expected_teacher
    assert inputs.teacher_positions.tolist() == expected_positions
    assert batch["attention_mask"].flatten()[inputs.student_index].all()
    assert inputs.layout.num_examples == len(encoded)
    assert inputs.layout.total_units == sum(map(sum, (pair["num_units"] for pair in encoded)))


def test_in_one_row_the_units_that_both_begin_with_are_named_once(encoded, student_tokenizer, teacher_tokenizer):
    batch = PairCollator(student_tokenizer, teacher_tokenizer, share_prompt=True)(encoded)
    inputs, layout = batch["interaction"], batch["interaction"].layout
    named = batch["input_ids"].flatten()[inputs.student_index][layout.token_index].tolist()
    padded = PairCollator(student_tokenizer, teacher_tokenizer)(encoded)
    index = padded["interaction"].student_index
    assert named == padded["input_ids"].flatten()[index].tolist()
    assert len(inputs.student_index) == len(set(inputs.student_index.tolist())) == layout.total_tokens < len(index)
    assert padded["interaction"].layout.token_index is None
    # All of the prompt, which the pairs differ behind.
    assert layout.shared_units.tolist() == [pair["num_units"][0] - pair["response_units"][0] for pair in encoded]
    assert torch.equal(layout.unit_offsets, padded["interaction"].layout.unit_offsets)


@pytest.mark.parametrize(
    ("positions", "units", "shared", "expected"),
    [
        pytest.param([[1, 2, 3, 5], [1, 2, 3, 6]], [[0, 1, 2, 3]] * 2, 4, 3, id="until they stand elsewhere"),
        pytest.param([[1, 2, 3], [1, 2, 3]], [[0, 1, 2]] * 2, 3, 2, id="until the row holds them twice"),
        pytest.param([[1, 2, 3], [1, 2, 3]], [[0, 1, 1], [0, 1, 2]], 9, 1, id="whole units of both"),
        pytest.param([[1, 2], [1, 2, 3]], [[0, 0], [0, 0, 0]], 9, 0, id="a unit that goes on in one"),
        pytest.param([[1, 2], [1, 2, 3]], [[0, 1], [0, 1, 2]], 9, 2, id="one is the beginning of the other"),
        pytest.param([[2, 3], [1, 2]], [[0, 1], [0, 1]], 9, 0, id="cut in one"),
        pytest.param([[], [1]], [[], [0]], 9, 0, id="nothing takes part"),
    ],
)
def test_shared_prefix_len(positions, units, shared, expected):
    assert shared_prefix_len(positions, units, shared) == expected


def test_a_pair_read_in_windows_has_a_row_for_each(student_tokenizer, teacher_tokenizer):
    settings = {"max_length": 64, "teacher_long_inputs": "windows"}
    short, long = (
        PairEncoder(student_tokenizer, teacher_tokenizer, teacher_max_length=length, **settings) for length in (64, 9)
    )
    pairs = [long(RECORDS[0]), short(RECORDS[1]), long(RECORDS[1])]
    rows = [len(pair["teacher_window_lengths"]) for pair in pairs]
    assert rows[0] > 1 == rows[1] < rows[2]
    inputs = PairCollator(student_tokenizer, teacher_tokenizer)(pairs)["interaction"]
    assert inputs.teacher_input_ids.shape == (sum(rows), max(max(pair["teacher_window_lengths"]) for pair in pairs))
    assert inputs.teacher_attention_mask.sum(1).tolist() == [
        n for pair in pairs for n in pair["teacher_window_lengths"]
    ]
    whole = PairCollator(student_tokenizer, teacher_tokenizer)([short(RECORDS[0]), pairs[1], pairs[1]])["interaction"]
    for name in ("teacher_input_ids", "teacher_token_type_ids"):
        own, expected = (getattr(of, name).flatten()[of.teacher_index].tolist() for of in (inputs, whole))
        assert own == expected
    assert torch.equal(inputs.teacher_positions, whole.teacher_positions)
    assert inputs.teacher_span == whole.teacher_span == 1 + whole.teacher_positions.max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_chosen_then_rejected_padded_on_the_right_whatever_the_tokenizer_prefers(
    encoded, student_tokenizer, side
):
    tokenizer = copy.deepcopy(student_tokenizer)
    tokenizer.padding_side = side
    batch = PairCollator(tokenizer)(encoded)
    sequences = [pair["chosen_input_ids"] for pair in encoded] + [pair["rejected_input_ids"] for pair in encoded]
    for row, mask, sequence in zip(batch["input_ids"], batch["attention_mask"], sequences, strict=True):
        assert row[mask.bool()].tolist() == sequence
        assert set(row[~mask.bool()].tolist()) <= {tokenizer.pad_token_id}
        assert mask[0] == 1
    assert "interaction" not in batch


def test_margins_are_zero_where_a_pair_has_none(encoded, student_tokenizer):
    assert PairCollator(student_tokenizer)(encoded)["margin"].tolist() == [0.0, 0.5]
    assert "margin" not in PairCollator(student_tokenizer)(encoded[:1])


def test_response_rows_weigh_one_and_prompt_rows_nothing(encoded, student_tokenizer, teacher_tokenizer):
    assert PairCollator(student_tokenizer, teacher_tokenizer)(encoded)["interaction"].row_weights is None
    inputs = PairCollator(student_tokenizer, teacher_tokenizer, "response")(encoded)["interaction"]
    expected = []
    for pair in encoded:
        for units, response in zip(pair["num_units"], pair["response_units"], strict=True):
            assert 0 < response < units
            expected += [0.0] * (units - response) + [1.0] * response
    assert inputs.row_weights.tolist() == expected


def test_a_pair_without_units_has_empty_segments(encoded, student_tokenizer, teacher_tokenizer):
    empty = {
        **encoded[0],
        **{f"{side}_{what}": [[], []] for side in ("student", "teacher") for what in ("positions", "units")},
        "num_units": [0, 0],
        "response_units": [0, 0],
    }
    inputs = PairCollator(student_tokenizer, teacher_tokenizer, "response")([empty, encoded[1]])["interaction"]
    alone = PairCollator(student_tokenizer, teacher_tokenizer, "response")([encoded[1]])["interaction"]
    assert inputs.layout.num_examples == 2
    assert inputs.layout.total_units == alone.layout.total_units
    assert torch.equal(inputs.teacher_positions, alone.teacher_positions)
