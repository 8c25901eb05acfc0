"""What policies learn from and go on from: the same texts that reward models read."""

import json

import pytest

from idrm.errors import InputError
from idrm.evaluation.reading import MessageReader
from idrm.policy.dialogues import completion_text, load_examples, prompt_text
from idrm.policy.prompts import prompt_ids, short_prompts
from idrm.preference import load_preferences

POST = {"subreddit": "tea", "title": "Kettle", "post": "It boils."}
TLDR = {"info": POST, "summaries": [{"text": "A kettle."}, {"text": " Boils a lot."}], "choice": 1}


@pytest.fixture
def tldr_path(tmp_path):
    """Two comparisons of summaries of one post."""
    path = tmp_path / "tldr.jsonl"
    path.write_text((json.dumps(TLDR) + "\n") + json.dumps({**TLDR, "choice": 0}) + "\n")
    return path


@pytest.fixture(params=["hh", "tldr"])
def source(request, pairs_path, tldr_path):
    return str({"hh": pairs_path, "tldr": tldr_path}[request.param])


def test_prompt_and_completion_are_what_a_reward_model_reads(source, student_tokenizer):
    examples, _ = load_examples("sft", source, "train", False)
    reader = MessageReader(student_tokenizer, 256)
    for example, pair in zip(examples, load_preferences(source)[0], strict=True):
        text = example["prompt"] + example["completion"] + student_tokenizer.eos_token
        ids = student_tokenizer(text)["input_ids"]
        assert ids == reader.one(pair["chosen"], pair["conversational"])
        # The border lies between two tokens of the whole text, where training and generation both have it.
        prompt = student_tokenizer(example["prompt"])["input_ids"]
        assert ids[: len(prompt)] == prompt


def test_dpo_has_both_responses_to_one_prompt(source):
    examples, _ = load_examples("dpo", source, "train", False)
    for example, pair in zip(examples, load_preferences(source)[0], strict=True):
        for side in ("chosen", "rejected"):
            *prompt, response = pair[side]
            assert example[side] == completion_text(prompt, response, pair["conversational"])
            assert example["prompt"] == prompt_text(prompt, pair["conversational"])


def test_with_a_chat_template_they_are_messages(source):
    example = load_examples("dpo", source, "train", True)[0][0]
    pair = load_preferences(source)[0][0]
    assert example == {
        "prompt": pair["chosen"][:-1],
        "chosen": [pair["chosen"][-1]],
        "rejected": [pair["rejected"][-1]],
    }


def test_each_prompt_is_there_once(tldr_path):
    examples, summary = load_examples("prompts", str(tldr_path), "train", False)
    assert len(examples) == 1
    assert summary.endswith("1 examples; 1 left out (no prompt, or one that is there already)")
    assert examples[0]["prompt"].endswith("TL;DR:")
    assert not examples[0]["conversational"]


def test_pairs_that_an_action_cannot_use_are_counted_or_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    dialogues = [
        ("\n\nHuman: Far?\n\nAssistant: Yes.", "\n\nHuman: Near?\n\nAssistant: Yes."),
        ("\n\nHuman: Far?\n\nAssistant: Yes.", "\n\nHuman: Far?\n\nAssistant: No."),
    ]
    path.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in dialogues))
    examples, summary = load_examples("dpo", str(path), "train", False)
    assert len(examples) == 1
    assert summary.endswith("1 examples; 1 left out (no prompt, or not the same for both responses)")
    path.write_text(json.dumps({"chosen": "\n\nAssistant: Yes.", "rejected": "Near", "prompt": ""}) + "\n")
    with pytest.raises(InputError, match="no pair can be used: none has a prompt"):
        load_examples("sft", str(path), "train", False)


def test_prompts_of_a_chat_template_end_where_the_response_begins(chat_tokenizer):
    messages = [{"role": "user", "content": "Is it far?"}]
    (ids,) = prompt_ids(chat_tokenizer, [messages])
    assert chat_tokenizer.decode(ids) == "<s>[user] Is it far?</s>[assistant] "
    assert ids.count(chat_tokenizer.bos_token_id) == 1


def test_prompts_that_are_too_long_are_left_out(pairs_path, student_tokenizer):
    examples, _ = load_examples("prompts", str(pairs_path), "train", False)
    lengths = [len(ids) for ids in prompt_ids(student_tokenizer, examples["prompt"][:])]
    middle = sorted(lengths)[len(lengths) // 2]
    kept, ids, summary = short_prompts(examples, student_tokenizer, middle)
    assert list(map(len, ids)) == [length for length in lengths if length <= middle]
    assert ids == prompt_ids(student_tokenizer, kept["prompt"][:])
    assert summary.endswith(f"{sum(length > middle for length in lengths)} longer, left out")
    assert len(short_prompts(examples, student_tokenizer, None)[1]) == len(examples)
    with pytest.raises(InputError, match="prompts are longer"):
        short_prompts(examples, student_tokenizer, 2)
