"""Response files are matched by prompt or id, and what is wrong with them is named by file and line."""

import re

import pytest

from idrm.errors import InputError
from idrm.judging import Message, match_responses, read_responses


@pytest.fixture
def matched(write_lines):
    """matched(records of A, records of B): their pairs."""

    def match(a, b):
        return match_responses(read_responses(write_lines("a.jsonl", a)), read_responses(write_lines("b.jsonl", b)))

    return match


@pytest.fixture
def refusal(matched, tmp_path):
    """refusal(records of A, records of B): the error's line, the folder's name left out."""

    def match(a, b):
        with pytest.raises(InputError) as error:
            matched(a, b)
        line = str(error.value)
        assert "\n" not in line
        return line.replace(f"{tmp_path}/", "")

    return match


def said(prompt, response, **fields):
    return {"prompt": prompt, "response": response, **fields}


def test_prompts_are_matched_in_the_order_of_the_first_file(matched):
    pairs = matched([said("p", "1"), said("q", "2")], [said("q", "3", model="x"), "", said("p", "4")])
    assert [(pair.prompt[0].content, pair.a, pair.b) for pair in pairs] == [("p", "1", "4"), ("q", "2", "3")]


def test_a_string_is_one_user_message(matched):
    messages = [{"role": "user", "content": "p"}]
    assert matched([said("p", "1")], [said(messages, "2")])[0].prompt == (Message("user", "p"),)
    assert matched([said(messages, "1")], [said("p", "2")])[0].b == "2"


def test_ids_let_a_prompt_stand_twice(matched):
    pairs = matched([said("p", "1", id=7), said("p", "2", id="x")], [said("p", "3", id="x"), said("p", "4", id=7)])
    assert [(pair.identifier, pair.a, pair.b) for pair in pairs] == [(7, "1", "4"), ("x", "2", "3")]


def test_ids_of_one_file_alone_are_not_matched(matched):
    pairs = matched([said("p", "1", id=1), said("q", "2", id=2)], [said("q", "3"), said("p", "4")])
    assert [(pair.a, pair.b) for pair in pairs] == [("1", "4"), ("2", "3")]


def test_a_line_may_hold_unusual_line_ends_and_characters(matched):
    assert matched(['{"prompt": "p\u2028q", "response": "\u0085é"}'], [said("p\u2028q", "2")])[0].a == "\u0085é"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "p", "response":', "a.jsonl:2: malformed JSON"),
        ('["p", "r"]', "a.jsonl:2: expected a JSON object, found list"),
        ({"prompt": "p"}, "a.jsonl:2: .* found no 'response'"),
        ({"prompt": None, "response": "r"}, "a.jsonl:2: .* found no 'prompt'"),
        ({"prompt": "p", "response": ["r"]}, "a.jsonl:2: expected a string as 'response', found list"),
        ({"prompt": "p", "response": "r", "id": 1.5}, "a.jsonl:2: .* 'id', found float"),
        ({"prompt": [], "response": "r"}, "a.jsonl:2: expected as 'prompt'"),
        ({"prompt": [{"role": "user", "content": 1}], "response": "r"}, "a.jsonl:2: expected as 'prompt'"),
        ({"prompt": "p", "response": "\ud800"}, "a.jsonl:2: malformed JSON: surrogates"),
    ],
)
def test_malformed_lines(refusal, line, expected):
    assert re.match(expected, refusal([said("first", "1"), line], [said("first", "1")]))


def test_what_is_missing_or_double(refusal):
    p, q, r = (said(prompt, "1") for prompt in "pqr")
    assert refusal([p, q, r], [p]) == "a.jsonl:2: prompt 'q' has no counterpart in b.jsonl (and 1 more)"
    assert refusal([p], [q, p]) == "b.jsonl:1: prompt 'q' has no counterpart in a.jsonl"
    assert refusal([p, q, p], [p]).startswith("a.jsonl:3: prompt 'p' is already in a.jsonl:1; give every line")
    ids = [said("p", "1", id=5), said("p", "2", id=5)]
    assert refusal(ids, ids) == "a.jsonl:2: id 5 is already in a.jsonl:1"
    assert refusal([said("p", "1", id=5)], ["", said("q", "2", id=5)]) == (
        "a.jsonl:1, b.jsonl:2: the prompts of id 5 differ"
    )


def test_files_that_cannot_be_read(refusal, tmp_path):
    assert refusal([], [said("p", "1")]) == "a.jsonl: holds no responses"
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "p", "response": "r"}\n\xe9\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:2: is not UTF-8"):
        read_responses(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_responses(tmp_path / "none.jsonl")
