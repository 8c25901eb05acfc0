"""Responses: those of transformers alone, the same again, in a file that the judge reads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from idrm.errors import InputError
from idrm.judging.responses import read_responses
from idrm.policy.dialogues import load_examples
from idrm.policy.generation import generate, parse_arguments


@pytest.fixture
def answer(tmp_path, sft_path, eval_pairs_path):
    """answer(*flags): the file that the policy's responses to the held-out prompts are in."""

    def run(*flags):
        path = tmp_path / "responses.jsonl"
        own = ("--model_name_or_path", sft_path, "--dataset_name", eval_pairs_path, "--output_file", path)
        generate(parse_arguments([*map(str, (*own, "--max_new_tokens", 12, "--device", "cpu", *flags))]))
        return path

    return run


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_greedy_responses_are_those_of_transformers_alone(answer, sft_path, eval_pairs_path, batch_size):
    responses = read_responses(answer("--temperature", 0, "--batch_size", batch_size))
    tokenizer = AutoTokenizer.from_pretrained(sft_path)
    model = AutoModelForCausalLM.from_pretrained(sft_path)
    examples, _ = load_examples("prompts", str(eval_pairs_path), "test", False)
    assert len(responses) == len(examples) == 11
    for response, example in zip(responses, examples, strict=True):
        ids = tokenizer(example["prompt"], return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert response.text == tokenizer.decode(written, skip_special_tokens=True).strip()
        assert [message._asdict() for message in response.prompt] == example["messages"]


def test_a_seed_gives_the_same_responses(answer):
    first = answer("--seed", 1).read_text()
    assert answer("--seed", 1, "--overwrite", "true").read_text() == first
    assert answer("--seed", 2, "--overwrite", "true").read_text() != first


def test_the_first_prompts_cut_from_the_left(answer):
    lines = [json.loads(line) for line in answer("--max_prompts", 3, "--max_prompt_length", 8).read_text().splitlines()]
    assert len(lines) == 3


def test_refusals(answer, tmp_path):
    answer()
    with pytest.raises(InputError, match="is there already; give another name, or --overwrite true"):
        answer()
    for flags, message in (
        (("--output_file", tmp_path / "r.json"), "expected a name that ends with .jsonl"),
        (("--max_new_tokens", 255), "leaves no room for a prompt; the policy reads 256 tokens"),
        (("--max_prompt_length", 250), "with the response, more than the 256 tokens the policy reads"),
        (("--top_p", 0), "--top_p: expected more than 0"),
        (("--temperature", -1), "--temperature"),
        (("--model_name_or_path", "./nowhere"), "no such folder"),
        (("--device", "cuda:77"), "--device cuda:77"),
    ):
        with pytest.raises(InputError, match=message):
            answer("--overwrite", "true", *flags)
