"""From verdicts in both orders to outcomes and a win rate."""

import threading
import time

import pytest

from idrm.errors import InputError
from idrm.judging import JudgedPair, Message, ResponsePair, Verdict, judge_pairs, win_rate


class ScriptedJudge:
    """Prefers what a function of (first, second) says."""

    def __init__(self, prefer):
        self._prefer = prefer
        self.questions = []

    def verdict(self, prompt, first, second):
        self.questions.append((prompt[0].content, first, second))
        return Verdict(self._prefer(first, second), ("answer",), 1)


def pairs(*responses, prompt=None):
    """Pairs of one prompt, or of a prompt for each."""
    return [
        ResponsePair((Message("user", str(number) if prompt is None else prompt),), a, b)
        for number, (a, b) in enumerate(responses)
    ]


def judged(a_first, b_first, prompt="p"):
    pair = ResponsePair((Message("user", prompt),), "a", "b")
    return JudgedPair(pair, Verdict(a_first, ("answer",)), Verdict(b_first, ("answer",)))


@pytest.mark.parametrize(
    ("a_first", "b_first", "outcome", "inconsistent"),
    [
        ("first", "second", "win", False),
        ("first", "tie", "win", False),
        ("tie", "second", "win", False),
        ("second", "first", "lose", False),
        ("second", "tie", "lose", False),
        ("tie", "first", "lose", False),
        ("tie", "tie", "tie", False),
        ("first", "first", "tie", True),
        ("second", "second", "tie", True),
        (None, "second", "unparseable", False),
        ("first", None, "unparseable", False),
        (None, "tie", "unparseable", False),
        (None, None, "unparseable", False),
    ],
)
def test_outcomes(a_first, b_first, outcome, inconsistent):
    pair = judged(a_first, b_first)
    assert (pair.outcome, pair.is_inconsistent) == (outcome, inconsistent)


def test_both_orders_are_asked_and_the_order_of_pairs_is_kept():
    judge = ScriptedJudge(lambda first, second: "first" if first > second else "second")
    given = pairs(("z", "y"), ("k", "l"), ("same", "same"))
    result = judge_pairs(judge, given, concurrency=2, show_progress=False)
    assert [pair.pair for pair in result] == given
    assert [pair.outcome for pair in result] == ["win", "lose", "tie"]
    numbers = [pair.prompt[0].content for pair in given]
    assert sorted(judge.questions) == sorted(
        [(numbers[0], "z", "y"), (numbers[0], "y", "z"), (numbers[1], "k", "l"), (numbers[1], "l", "k")]
    )


def test_equal_questions_are_asked_once():
    judge = ScriptedJudge(lambda first, second: "tie")
    result = judge_pairs(judge, pairs(("a", "b"), ("b", "a"), prompt="p"), show_progress=False)
    assert len(judge.questions) == 2
    assert [pair.outcome for pair in result] == ["tie", "tie"]


def test_questions_are_asked_at_once():
    barrier = threading.Barrier(4, timeout=20)

    class Waiting:
        def verdict(self, prompt, first, second):
            barrier.wait()
            return Verdict("tie")

    assert len(judge_pairs(Waiting(), pairs(("a", "b"), ("c", "d")), concurrency=4, show_progress=False)) == 2


def test_an_error_ends_the_comparison_while_others_wait():
    held = threading.Event()

    class Failing:
        def verdict(self, prompt, first, second):
            if first == "bad":
                raise InputError("no more")
            held.wait(60)
            return Verdict("tie")

    with pytest.raises(InputError, match="no more"):
        judge_pairs(Failing(), pairs(("good", "bad"), ("good", "fine")), concurrency=4, show_progress=False)
    assert not held.is_set()
    held.set()


def test_nothing_is_asked_after_an_error():
    asked = []

    class Failing:
        def verdict(self, prompt, first, second):
            asked.append(first)
            if len(asked) == 3:
                raise InputError("no more")
            return Verdict("tie")

    with pytest.raises(InputError, match="no more"):
        judge_pairs(Failing(), pairs(*[("a", "b")] * 50), concurrency=1, show_progress=False)
    time.sleep(0.05)
    assert len(asked) == 3


def test_a_judge_that_goes_by_place_gives_ties_alone():
    judge = ScriptedJudge(lambda first, second: "first")
    result = win_rate(judge_pairs(judge, pairs(*[("a", "b")] * 5), show_progress=False))
    assert (result.wins, result.ties, result.loses) == (0, 5, 0)
    assert (result.win_rate, result.interval) == (None, None)
    assert (result.inconsistent_share, result.first_share) == (1.0, 1.0)


def test_the_win_rate_and_what_stands_beside_it():
    a, b, tie = ("first", "second"), ("second", "first"), ("tie", "tie")
    verdicts = [a] * 6 + [b] * 2 + [tie] + [("first", "first")] + [(None, "second")] + [(None, None)]
    result = win_rate(
        [judged(*pair, prompt=str(number)) for number, pair in enumerate(verdicts)]
        + [JudgedPair(pairs(("same", "same"))[0], None, None)]
    )
    assert (result.pairs, result.wins, result.ties, result.loses, result.unparseable) == (13, 6, 3, 2, 2)
    assert result.identical == 1
    assert result.win_rate == 6 / 8
    assert result.inconsistent_share == 1 / 10
    assert result.first_share == 10 / 19
    assert (result.verdicts, result.unparseable_share) == (24, 3 / 24)
    assert 0.3 < result.interval.low < 6 / 8 < result.interval.high <= 1


def test_the_interval_draws_whole_prompts():
    """Sixteen decided pairs of two prompts tell no more than the two prompts do."""
    of_prompts = [judged("first", "second", "p")] * 8 + [judged("second", "first", "q")] * 8
    assert win_rate(of_prompts).interval == (0.0, 1.0)


def test_reminders_are_counted():
    pair = judged("first", "second").pair
    result = win_rate([JudgedPair(pair, Verdict("first", ("what?", "Verdict: 1")), Verdict("second", ("Verdict: 2",)))])
    assert (result.reminded_share, result.unparseable_share, result.wins) == (0.5, 0.0, 1)
