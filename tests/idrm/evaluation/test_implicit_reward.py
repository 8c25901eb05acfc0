"""The implicit reward of a DPO policy: response tokens only, whatever the batches."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from idrm.errors import InputError
from idrm.evaluation.implicit_reward import load_implicit_reward_model

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
PAIRS = [
    ("Is the lamp green?", "It is blue.", "No."),
    ("Please repeat the order, friend.", "Seven, twelve and a kettle that boils slowly.", "The river reads."),
    ("What is the price?", "Twelve.", "I do not know the price of the lamp, neighbour, nor of the kettle."),
]


def messages(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="module")
def policies(tmp_path_factory, student_tokenizer):
    """Two tiny language models of random weights, a policy and its reference."""
    folders = []
    for seed, name in enumerate(("policy", "reference")):
        config = LlamaConfig(
            vocab_size=len(student_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
        )
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folder)
        student_tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def log_likelihood(folder, prompt, response):
    """By transformers' logits alone: of the tokens behind the rendered prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    before = f"<s><user>{prompt}</s><assistant>"
    ids = tokenizer(f"{before}{response}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0]
    return sum(scores[place - 1, ids[0, place]].item() for place in range(length, ids.shape[1]))


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("batching", [{"batch_size": 1}, {"batch_size": 6}, {"batch_size": 6, "tokens_per_batch": 90}])
def test_the_reward_is_the_ratio_of_likelihoods_of_the_response(policies, with_reference, batching):
    policy, reference = policies
    model = load_implicit_reward_model(
        policy, reference if with_reference else None, beta=0.25, dtype="float64", device="cpu"
    )
    inputs, expected = [], []
    for prompt, *responses in PAIRS:
        inputs += model.encode_pair(*(messages(prompt, response) for response in responses), True)
        for response in responses:
            ratio = log_likelihood(policy, prompt, response)
            ratio -= log_likelihood(reference, prompt, response) if with_reference else 0.0
            expected.append(0.25 * ratio)
    assert model.rewards(inputs, show_progress=False, **batching) == pytest.approx(expected, rel=1e-10)


def test_a_prompt_that_is_cut_leaves_the_response_scored(policies):
    whole = load_implicit_reward_model(policies[0], None, device="cpu").encode(messages(*PAIRS[1][:2]), True)
    model = load_implicit_reward_model(policies[0], None, device="cpu", max_length=len(whole) - 5)
    cut = model.encode(messages(*PAIRS[1][:2]), True)
    assert len(cut) <= len(whole) - 5
    assert cut.response_tokens == whole.response_tokens
    assert cut.ids[-cut.response_tokens :] == whole.ids[-whole.response_tokens :]
    # Even a response that is cut has a token before it, without which it has no likelihood.
    short = load_implicit_reward_model(policies[0], None, device="cpu", max_length=8)
    assert short.encode(messages(*PAIRS[1][:2]), True).response_tokens == 7


def test_plain_texts_are_scored_from_their_response_on(tmp_path, policies):
    shutil.copytree(policies[0], tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    tokenizer.chat_template = None
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "plain")
    model = load_implicit_reward_model(str(tmp_path / "plain"), None, device="cpu")
    encoded = model.encode([{"role": "user", "content": "TL;DR:"}, {"role": "assistant", "content": " A lake."}], False)
    assert tokenizer.decode(encoded.ids[-encoded.response_tokens :]) == " A lake.</s>"
    # To say nothing has a likelihood too.
    empty = model.encode([{"role": "user", "content": "Go on."}, {"role": "assistant", "content": ""}], True)
    assert empty.response_tokens == 1


def test_a_reference_of_other_tokens_is_refused(tmp_path, policies):
    other = tmp_path / "other"
    shutil.copytree(policies[1], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["kettledrum"])
    tokenizer.save_pretrained(other)
    load_implicit_reward_model(str(other), policies[1], device="cpu")  # a policy may have added some
    with pytest.raises(InputError, match=r"other: reads other tokens than .* \(for instance 'kettledrum'\)"):
        load_implicit_reward_model(policies[0], str(other), device="cpu")


def test_what_is_no_policy_is_one_line(policies, student_path):
    with pytest.raises(InputError, match="is a sequence classifier"):
        load_implicit_reward_model(str(student_path), policies[1], device="cpu")
    with pytest.raises(InputError, match="is a sequence classifier"):
        load_implicit_reward_model(policies[0], str(student_path), device="cpu")
    with pytest.raises(InputError, match="--beta: expected a positive number, got 0"):
        load_implicit_reward_model(policies[0], None, beta=0, device="cpu")
