"""A judge behind an endpoint: what it is asked, reminders, and the answers that are not asked for again."""

import json
import os
import time

import pytest

from idrm.errors import InputError
from idrm.judging import AnswerCache, ChatEndpoint, EndpointJudge, Message
from idrm.judging.template import REMINDER

PROMPT = (Message("user", "Why is the sky blue?"),)


@pytest.fixture
def judge(endpoint, tmp_path):
    """judge(...): an EndpointJudge at the stub, with the cache of all others."""
    with ChatEndpoint(endpoint.url, first_wait=0.001) as client:
        yield lambda model="m", **options: EndpointJudge(client, model, AnswerCache(tmp_path / "answers"), **options)


def entries(tmp_path):
    return sorted((tmp_path / "answers").iterdir())


def test_the_request(endpoint, judge):
    verdict = judge(max_tokens=300).verdict(PROMPT, "Rayleigh scattering.", "Paint.")
    assert (verdict.preference, verdict.requests, verdict.answered_by) == ("first", 1, "stub-2026")
    (request,) = endpoint.requests
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 300,
    }
    assert [message["role"] for message in request["messages"]] == ["user"]
    assert "Why is the sky blue?" in request["messages"][0]["content"]
    assert endpoint.responses(request) == ("Rayleigh scattering.", "Paint.")


def test_what_was_answered_is_not_asked_again(endpoint, judge, tmp_path):
    first = judge().verdict(PROMPT, "long one", "short")
    again = judge().verdict(PROMPT, "long one", "short")
    assert (len(endpoint.requests), again.requests) == (1, 0)
    assert (again.preference, again.answers, again.answered_by) == (first.preference, first.answers, first.answered_by)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"model": "n"}, {"max_tokens": 9}, {"template": "{prompt} {first} {second}"}])
def test_another_request_is_another_entry(endpoint, judge, change):
    endpoint.answer = lambda request: "Verdict: 1"
    judge().verdict(PROMPT, "a", "b")
    judge(**change).verdict(PROMPT, "a", "b")
    assert len(endpoint.requests) == 2


def test_another_endpoint_is_another_entry(endpoint, judge, tmp_path):
    endpoint.answer = lambda request: "Verdict: 1"
    judge().verdict(PROMPT, "a", "b")
    with ChatEndpoint(endpoint.url.replace("127.0.0.1", "localhost"), first_wait=0.001) as client:
        EndpointJudge(client, "m", AnswerCache(tmp_path / "answers")).verdict(PROMPT, "a", "b")
    assert endpoint.requests[0] == endpoint.requests[1]
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"[1]",
        lambda content: content.replace(b"characters.\\nVerdict: 1", b"characters.\\nVerdict: 2"),
        lambda content: content.replace(b"Why is", b"Why isn't"),
        lambda content: content.replace(b"Why", b"\xff"),
    ],
)
def test_a_damaged_entry_is_asked_again(endpoint, judge, tmp_path, caplog, damage):
    judge().verdict(PROMPT, "long one", "short")
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    verdict = judge().verdict(PROMPT, "long one", "short")
    assert (verdict.preference, verdict.requests, len(endpoint.requests)) == ("first", 1, 2)
    assert entry.read_bytes() == whole
    assert f"{entry.name} is damaged" in caplog.text


def test_the_entry_of_another_request_is_no_answer(endpoint, judge, tmp_path):
    judge().verdict(PROMPT, "long one", "short")
    (own,) = entries(tmp_path)
    judge().verdict(PROMPT, "short", "long one")
    (other,) = set(entries(tmp_path)) - {own}
    own.write_bytes(other.read_bytes())
    verdict = judge().verdict(PROMPT, "long one", "short")
    assert (verdict.preference, verdict.requests) == ("first", 1)


def test_a_write_that_was_cut_short_leaves_no_entry(endpoint, judge, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(InputError, match=r"--cache_dir .*: cannot be written to \(No space left"):
            judge().verdict(PROMPT, "a", "bc")
    assert entries(tmp_path) == []
    assert judge().verdict(PROMPT, "a", "bc").preference == "second"


def test_left_overs_are_removed_once_they_are_old(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    for name, age in ((".writing-old", 7200), (".writing-new", 0)):
        (folder / name).touch()
        os.utime(folder / name, times=(time.time() - age,) * 2)
    AnswerCache(folder)
    assert [path.name for path in entries(tmp_path)] == [".writing-new"]


def test_a_judge_without_a_verdict_is_reminded(endpoint, judge):
    endpoint.answer = lambda request: "Verdict: 2" if len(request["messages"]) == 3 else "Hard to say."
    verdict = judge().verdict(PROMPT, "a", "b")
    assert (verdict.preference, verdict.answers, verdict.requests) == ("second", ("Hard to say.", "Verdict: 2"), 2)
    assert endpoint.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": "Hard to say."},
        {"role": "user", "content": REMINDER},
    ]


def test_a_judge_that_gives_none_is_unparseable_and_not_asked_again(endpoint, judge):
    answers = iter(["", "Tie.", "Both, verdict: tie"])
    endpoint.answer = lambda request: next(answers)
    for requests in (3, 0):
        verdict = judge().verdict(PROMPT, "a", "b")
        assert verdict.preference is None
        assert (verdict.answers, verdict.requests) == (("", "Tie.", "Both, verdict: tie"), requests)
    assert endpoint.requests[2]["messages"][1]["content"] == "(no answer)"
    assert judge(max_reminders=0).verdict(PROMPT, "a", "b").answers == ("",)
    assert len(endpoint.requests) == 3


def test_an_entry_says_what_was_asked(endpoint, judge, tmp_path):
    judge().verdict(PROMPT, "long one", "short")
    entry = json.loads(entries(tmp_path)[0].read_text(encoding="utf-8"))
    assert entry["request"] == endpoint.requests[0]
    assert entry["answer"]["text"].endswith("Verdict: 1")
