"""Flipping labels, and the columns that say how much better chosen is."""

import json

import pytest

from idrm.arguments import margins_of_labels
from idrm.errors import InputError
from idrm.objectives import flip_labels
from idrm.preference import PairColumns, convert_record, load_preferences


@pytest.fixture
def load(tmp_path):
    """load(values, columns): the pairs of a file in which each record has one of the values."""
    by_strength = PairColumns(strength="margin_mean")

    def make(values, columns=by_strength, key="margin_mean"):
        path = tmp_path / "pairs.jsonl"
        records = [
            {"prompt": f"Question {index}?", "chosen": f" yes {index}", "rejected": f" no {index}", key: value}
            for index, value in enumerate(values)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_preferences(str(path), columns=columns)[0]

    return make


def responses(pairs):
    return [
        (chosen[-1]["content"], rejected[-1]["content"])
        for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True)
    ]


def test_the_lowest_fraction_of_those_with_a_strength_is_flipped(load):
    values = [0.5, -2.0, None, 1.5, -0.5, 3.0, None, 2.0, 0.0, 1.0, -1.0, 4.0]
    pairs = load(values)
    flipped, report = flip_labels(pairs, 0.3)
    expected = [
        (rejected, chosen) if index in (1, 4, 10) else (chosen, rejected)
        for index, (chosen, rejected) in enumerate(responses(pairs))
    ]
    assert responses(flipped) == expected
    assert (report.pairs, report.judged, report.flipped, report.highest) == (12, 10, 3, -0.5)
    assert report.summary() == (
        "labels flipped: 3 of 10 pairs, of the lowest strength, up to -0.5000; 2 have none and stay"
    )


def test_equal_strengths_are_flipped_in_their_order(load):
    flipped, _ = flip_labels(load([1.0, 0.0, 0.0, 0.0]), 0.5)
    assert [chosen.strip().split()[0] for chosen, _ in responses(flipped)] == ["yes", "no", "no", "yes"]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.29, 29), (0.2, 20), (0.999, 99), (1.0, 100)])
def test_the_count_is_rounded_down(load, fraction, count):
    assert flip_labels(load([float(index) for index in range(100)]), fraction)[1].flipped == count


def test_a_flipped_margin_changes_its_sign(load):
    columns = PairColumns(margin="margin_mean", strength="margin_mean")
    flipped, _ = flip_labels(load([-2.0, 1.0, None, 3.0], columns), 0.4)
    assert flipped["margin"][:] == [2.0, 1.0, None, 3.0]


def test_another_fraction_is_another_data_set(load):
    pairs = load([1.0, 2.0, 3.0, 4.0])
    prints = {flip_labels(pairs, fraction)[0]._fingerprint for fraction in (0.0, 0.25, 0.5)}
    assert len(prints) == 3


def test_without_any_strength_it_is_refused(load):
    with pytest.raises(InputError, match="no training pair has a value in --flip_column"):
        flip_labels(load([None, None]), 0.2)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("llama2_small", [1, 2 / 3, 1 / 3, 0, 0, None]), ("llama2_large", [3, 2, 1, 0, 0, None])],
)
def test_words_stand_for_margins(load, preset, expected):
    words = ["Significantly Better", "better", "slightly better ", "Negligibly better", "unsure", None]
    columns = PairColumns(margin="strength_label", margin_labels=margins_of_labels([preset]))
    assert load(words, columns, "strength_label")["margin"][:] == expected


def test_labels_of_ones_own(load):
    margins = margins_of_labels(["A bit=0.5", "much = 2", "a = b=1"])
    assert margins == {"a bit": 0.5, "much": 2.0, "a = b": 1.0}
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"}
    assert convert_record(record, PairColumns(margin_labels=margins))["margin"] == 2.0
    with pytest.raises(InputError, match="expected one of 'a bit', 'much', 'a = b' as 'margin', found 'some'"):
        convert_record({**record, "margin": "some"}, PairColumns(margin_labels=margins))


@pytest.mark.parametrize("labels", [["much"], ["much=more"], ["=1"], ["much=nan"], ["much=1", "Much=2"]])
def test_labels_that_say_nothing_are_refused(labels):
    with pytest.raises(InputError, match="--margin_labels"):
        margins_of_labels(labels)
