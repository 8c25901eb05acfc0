"""The question put to a judge, and what is taken for a verdict."""

import pytest

from idrm.errors import InputError
from idrm.judging import Message, load_template, read_verdict
from idrm.judging.template import REMINDER, fill_template


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("Verdict: 1", "first"),
        ("The second is true.\n\nVerdict: 2\n", "second"),
        ("Both fail.\r\n**VERDICT: Tie**  ", "tie"),
        ("Verdict: 1\nOn reflection, yes.\nVerdict: 1", "first"),
        ("", None),
        ("I prefer the first one.", None),
        ("Verdict: 1, clearly", None),
        ("I would say Verdict: 1", None),
        ("Verdict: 1\nBut who knows?", None),
        ("Verdict: 1\nNo, the other one.\nVerdict: 2", None),
        ("Verdict: 1\nVerdict: 2\nVerdict: tie", None),
        ("Verdict: 3", None),
        ("Verdict: 12", None),
    ],
)
def test_verdicts(answer, preference):
    assert read_verdict(answer) == preference


def test_the_built_in_question_holds_both_responses_in_order():
    text = fill_template(load_template(), (Message("user", "Why?"),), "because", "don't know")
    assert "<conversation>\nWhy?\n</conversation>" in text
    assert text.index("\nbecause\n") < text.index("\ndon't know\n")
    # The three verdicts that it offers are those that are read.
    for offered in (text, REMINDER):
        assert [read_verdict(line) for line in offered.splitlines()[-3:]] == ["first", "second", "tie"]


def test_braces_in_texts_are_not_fields():
    prompt = (Message("system", "Be {first}."), Message("user", "{second}"))
    filled = fill_template("{prompt} | {first} | {second} | {json: {}}", prompt, "{second}", r"\1 {prompt}")
    assert filled == r"System: Be {first}.\n\nUser: {second} | {second} | \1 {prompt} | {json: {}}".replace(r"\n", "\n")


def test_a_template_without_a_field_is_refused(tmp_path):
    (tmp_path / "template.txt").write_text("{prompt} {first}")
    with pytest.raises(InputError, match=r"--judge_template .*template\.txt: .* lacks \{second\}"):
        load_template(tmp_path / "template.txt")
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        load_template(tmp_path / "none.txt")
