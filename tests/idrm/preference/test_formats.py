import pytest

from idrm.errors import InputError
from idrm.preference import convert_record, drop_reason


def _roles_and_contents(messages):
    return [(message["role"], message["content"]) for message in messages]


def _pair(record):
    pair = convert_record(record)
    return _roles_and_contents(pair["chosen"]), _roles_and_contents(pair["rejected"]), pair["conversational"]


def test_hh_dialogue_is_split_at_its_role_headers():
    prompt = "\n\nHuman: Hi:\n\nHuman things?\n\nAssistant: Yes.\n\nHuman:  More"
    chosen, rejected, conversational = _pair(
        {"chosen": f"{prompt}\n\nAssistant: Sure. ", "rejected": f"{prompt}\n\nAssistant:"}
    )
    turns = [("user", "Hi:\n\nHuman things?"), ("assistant", "Yes."), ("user", "More")]
    assert chosen == [*turns, ("assistant", "Sure.")]
    assert rejected == [*turns, ("assistant", "")]
    assert conversational


def test_a_system_header_counts_at_the_start_only():
    dialogue = "\n\nSystem: Be brief.\n\nHuman: a\n\nSystem: b\n\nAssistant: "
    chosen, _, _ = _pair({"chosen": dialogue + "c", "rejected": dialogue + "d"})
    assert chosen == [("system", "Be brief."), ("user", "a\n\nSystem: b"), ("assistant", "c")]


@pytest.mark.parametrize(
    ("prompt", "before"),
    [("\n\nHuman: Hi\n\nAssistant:", " "), ("\n\nHuman: Hi", "\n\nAssistant: "), ("\n\nHuman: Hi", "")],
)
def test_hh_dialogue_with_its_prompt_apart(prompt, before):
    chosen, rejected, conversational = _pair(
        {"prompt": prompt, "chosen": f"{before}Hello", "rejected": f"{before}Go away"}
    )
    assert chosen == [("user", "Hi"), ("assistant", "Hello")]
    assert rejected == [("user", "Hi"), ("assistant", "Go away")]
    assert conversational


def test_hh_dialogue_with_its_prompt_repeated_in_a_column():
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    chosen, _, _ = _pair({"prompt": prompt, "chosen": f"{prompt} Hello", "rejected": f"{prompt} No"})
    assert chosen == [("user", "Hi"), ("assistant", "Hello")]


def test_prompt_and_response_strings_are_kept_to_the_letter():
    record = {"prompt": "2 + 2 =", "chosen": " 4\n", "rejected": " 5"}
    assert _pair(record) == (
        [("user", "2 + 2 ="), ("assistant", " 4\n")],
        [("user", "2 + 2 ="), ("assistant", " 5")],
        False,
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is seven", "The sky is set", "The sky is"),  # not in the middle of a word
        ("I agree", "I agree fully", "I"),  # both keep a response
        ("go on", "goes on", ""),
        ("Yes", "No", ""),
        ("a b", "a b ", "a"),
    ],
)
def test_the_common_beginning_of_bare_strings_is_the_prompt(chosen, rejected, prompt):
    first, second, conversational = _pair({"chosen": chosen, "rejected": rejected})
    assert not conversational
    assert "".join(content for _, content in first) == chosen
    assert "".join(content for _, content in second) == rejected
    assert first[:-1] == second[:-1] == ([("user", prompt)] if prompt else [])


def test_conversational_records():
    user, good, bad = (
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Hello"},
        {"role": "assistant", "content": "Bye"},
    )
    expected = ([("user", "Hi"), ("assistant", "Hello")], [("user", "Hi"), ("assistant", "Bye")], True)
    assert _pair({"prompt": [user], "chosen": [good], "rejected": [bad]}) == expected
    assert _pair({"chosen": [user, good], "rejected": [user, bad]}) == expected
    assert _pair({"prompt": "Hi", "chosen": [good], "rejected": [bad]}) == expected
    assert _pair({"prompt": "Hi", "chosen": [user, good], "rejected": [user, bad]}) == expected


@pytest.mark.parametrize("choice", [0, 1])
def test_tldr_comparison(choice):
    record = {
        "info": {
            "id": "t3",
            "post": "I lost it.",
            "title": "My hat",
            "subreddit": "hats",
            "site": None,
            "article": None,
        },
        "summaries": [{"text": " Hat gone.", "policy": "a"}, {"text": "Nice hat.", "policy": "b"}],
        "choice": choice,
    }
    chosen, rejected, conversational = _pair(record)
    prompt = ("user", "SUBREDDIT: r/hats\n\nTITLE: My hat\n\nPOST: I lost it.\n\nTL;DR:")
    responses = [("assistant", " Hat gone."), ("assistant", " Nice hat.")]
    assert (chosen, rejected) == ([prompt, responses[choice]], [prompt, responses[1 - choice]])
    assert not conversational


def test_tldr_comparison_of_news():
    summaries = [{"text": "x"}, {"text": "y"}]
    chosen, _, _ = _pair({"info": {"article": "News.", "title": "T"}, "summaries": summaries, "choice": 0})
    assert chosen[0] == ("user", "TITLE: T\n\nARTICLE: News.\n\nTL;DR:")


@pytest.mark.parametrize(("margin", "expected"), [(None, None), (2, 2.0), (-0.5, -0.5)])
def test_margin(margin, expected):
    assert convert_record({"chosen": "a b", "rejected": "a c", "margin": margin})["margin"] == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "text": "b", "rejected": None}, "'chosen' and 'rejected'.*found 'chosen', 'text'"),
        ({}, "found none"),
        ({"chosen": "a", "rejected": ["b"]}, "as 'chosen', found str"),
        ({"chosen": [{"role": "user"}], "rejected": []}, "message with content None"),
        ({"chosen": [{"role": "user", "content": ["x"]}], "rejected": []}, "message with content"),
        ({"chosen": ["a"], "rejected": ["b"]}, "list of str"),
        ({"chosen": 1, "rejected": 2}, "found int"),
        ({"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}, "string as 'prompt'.*list"),
        ({"chosen": "a", "rejected": "b", "margin": "big"}, "number as 'margin', found 'big'"),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "finite number"),
        ({"info": {"title": "x"}, "summaries": [], "choice": 0}, "'post' or an 'article'"),
        ({"info": {"post": "x"}, "summaries": [{"text": "a"}], "choice": 0}, "two objects"),
        ({"info": {"post": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "0 or 1 as 'choice'"),
    ],
)
def test_faults_are_named(record, message):
    with pytest.raises(InputError, match=message) as error:
        convert_record(record)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("yes", "no", None),
        ("yes", " yes\n", "identical_responses"),
        ("\n ", "no", "empty_response"),
        ("yes", "", "empty_response"),
    ],
)
def test_drop_reason(chosen, rejected, reason):
    pair = convert_record({"prompt": "Well?", "chosen": chosen, "rejected": rejected})
    assert drop_reason(pair) == reason


def test_the_same_response_to_different_prompts_is_kept():
    pair = convert_record({"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: yes"})
    assert drop_reason(pair) is None


def test_identical_strings_without_a_prompt_count_as_identical():
    assert drop_reason(convert_record({"chosen": "the same", "rejected": "the same"})) == "identical_responses"
