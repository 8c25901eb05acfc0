"""Wins, ties, and the file that keeps them."""

import dataclasses
import json
import math

import pytest

from idrm.errors import InputError
from idrm.evaluation.outcomes import Outcome, Outcomes, read_outcomes, require_same_items, write_outcomes

ITEMS = [
    Outcome("i0", "chat", "p0", 0.5, (0.25,), 7, (9,)),
    Outcome("i1", "chat", "p0", 0.1, (0.1,), 7, (7,)),
    Outcome("i2", "safety", "p1", 1 / 3, (-2.0, 1 / 3, 0.0), 5, (9, 8, 6)),
    Outcome("i3", "safety", "p2", 0.75, (-2.0, 0.5, 0.0), 9, (6, 8, 9)),
    Outcome("i4", "safety", "p3", 0.4, (0.1, 0.5), 9, (6, 8)),
    Outcome("i5", "safety", "p4", math.nan, (math.nan,), 0, (0,)),
]


@pytest.fixture
def outcomes():
    return Outcomes("idrm", "bench", ITEMS, {"model": "some/folder", "version": "1"})


def test_a_win_is_strict_and_over_every_loser(outcomes):
    assert outcomes.won.tolist() == [True, False, False, True, False, False]
    assert outcomes.tied.tolist() == [False, True, True, False, False, False]
    assert outcomes.unread.tolist() == [False] * 5 + [True]
    assert outcomes.length_won("shorter").tolist() == [True, False, True, False, False, False]
    assert outcomes.length_won("longer").tolist() == [False, False, False, False, True, False]
    assert outcomes.within(["chat"]).won.tolist() == [True, False]


def test_outcomes_come_back_bit_for_bit(tmp_path, outcomes):
    write_outcomes(tmp_path / "folder" / "bench.jsonl", outcomes)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["bench.jsonl"]
    again = read_outcomes(tmp_path / "folder" / "bench.jsonl")
    assert (again.model, again.benchmark, again.origin) == ("idrm", "bench", outcomes.origin)
    assert again.items[:5] == ITEMS[:5]
    assert again.unread[5]
    # What other JSON readers accept too: no NaN.
    last = (tmp_path / "folder" / "bench.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["chosen_reward"] is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-1], r"expected 6 items, found 5"),
        (lambda lines: [*lines[:3], lines[3][:20]], r"jsonl:4: is damaged"),
        (lambda lines: [*lines[:2], '{"item": "i1"}', *lines[3:]], r"jsonl:3: is damaged"),
        (lambda lines: ['{"chosen": "a", "rejected": "b"}'], r"expected an outcomes file of `idrm eval`"),
        (lambda lines: [], r"expected an outcomes file of `idrm eval`"),
    ],
)
def test_a_file_that_is_damaged_or_something_else_is_refused(tmp_path, outcomes, damage, message):
    path = tmp_path / "bench.jsonl"
    write_outcomes(path, outcomes)
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(InputError, match=message):
        read_outcomes(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot be read"):
        read_outcomes(tmp_path / "nowhere.jsonl")


def test_other_items_are_refused(outcomes):
    require_same_items(outcomes, dataclasses.replace(outcomes, model="other"), "a", "b")
    with pytest.raises(InputError, match="a and b: were measured on different benchmarks, bench and other"):
        require_same_items(outcomes, dataclasses.replace(outcomes, benchmark="other"), "a", "b")
    with pytest.raises(InputError, match="different items of bench, 6 and 2"):
        require_same_items(outcomes, outcomes.within(["chat"]), "a", "b")
    swapped = dataclasses.replace(outcomes, items=[*ITEMS[:2], ITEMS[3], ITEMS[2], *ITEMS[4:]])
    with pytest.raises(InputError, match="the first of them item 3"):
        require_same_items(outcomes, swapped, "a", "b")
