"""Rewards are those of transformers alone, whatever the pad token, the padding side and the batches."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from idrm.alignment import PairEncoder
from idrm.alignment.rendering import TemplateRefusal
from idrm.errors import InputError
from idrm.evaluation.neighbours import neighbours
from idrm.evaluation.reward_model import load_reward_model
from idrm.preference import load_preferences

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def sequences(student_tokenizer, eval_pairs_path):
    """The ids of 22 dialogues, EOS at their end as a model without a chat template reads them."""
    pairs, _ = load_preferences(str(eval_pairs_path))
    encoder = PairEncoder(student_tokenizer, None, max_length=256, teacher_max_length=8)
    encoded = [encoder(pair) for pair in pairs]
    return [pair[f"{side}_input_ids"] for pair in encoded for side in ("chosen", "rejected")]


@pytest.fixture
def variant(tmp_path, student_path):
    """variant(pad_token=..., chat_template=..., **config): the tiny reward model with another tokenizer, saved."""

    def make(pad_token="<|pad|>", chat_template=None, padding_side="right", **config):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(student_path, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token, tokenizer.chat_template, tokenizer.padding_side = pad_token, chat_template, padding_side
        tokenizer.save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        pad_token_id = tokenizer.pad_token_id if pad_token else None
        (folder / "config.json").write_text(json.dumps({**values, "pad_token_id": pad_token_id, **config}))
        return folder

    return make


def unpadded(folder, sequences, dtype):
    """Every sequence by itself, by transformers alone, which pools the last token where no pad token is named."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in sequences]


@pytest.mark.parametrize("pad_token", ["<|pad|>", "</s>", None])
def test_a_public_checkpoint_is_scored_as_by_transformers_alone(variant, sequences, pad_token):
    folder = variant(pad_token)
    model = load_reward_model(str(folder), device="cpu")
    expected = unpadded(folder, sequences, torch.float32)
    assert model.rewards(sequences, batch_size=1, show_progress=False) == expected
    assert model.rewards(sequences, show_progress=False) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if pad_token == "</s>":
        # What this is about: transformers takes the EOS at the end for padding.
        with torch.no_grad():
            careless = model.model(torch.tensor([sequences[0]])).logits.item()
        assert careless != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("pad_token", ["<|pad|>", "</s>"])
def test_rewards_depend_on_no_batch_and_no_padding_side(variant, sequences, pad_token):
    expected = unpadded(variant(pad_token), sequences, torch.float64)
    for padding_side in ("left", "right"):
        model = load_reward_model(str(variant(pad_token, padding_side=padding_side)), dtype="float64", device="cpu")
        for batching in ({"batch_size": 3}, {"batch_size": 22}, {"batch_size": 100, "tokens_per_batch": 150}):
            rewards = model.rewards(sequences, show_progress=False, **batching)
            assert rewards == pytest.approx(expected, rel=1e-11, abs=1e-12), batching
    assert model.model.config.pad_token_id == model.tokenizer.pad_token_id


def test_common_beginnings_are_read_once(student_path, sequences):
    model = load_reward_model(str(student_path), device="cpu")
    read = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    rewards = model.rewards(sequences, show_progress=False)
    distinct = set(map(tuple, sequences))
    pairs = neighbours(distinct)
    assert 2 * len(pairs) == len(distinct)
    assert sum(read) == sum(map(len, pairs)) < 0.8 * sum(map(len, distinct))
    apart = load_reward_model(str(student_path), device="cpu", share_prompt="off")
    assert not apart.reads_packed_pairs
    assert rewards == pytest.approx(apart.rewards(sequences, show_progress=False), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("sequences", "most_tokens", "expected"),
    [
        pytest.param([(1, 2, 3), (7,), (1, 2, 4)], None, [((1, 2, 3), (1, 2, 4), 2)], id="a pair and another"),
        pytest.param([(1, 2), (1, 2, 3), (1, 2)], None, [((1, 2), (1, 2, 3), 2)], id="one begins the other"),
        pytest.param(
            [(1, 5), (1, 6, 7), (1, 6, 8), (2,)],
            None,
            [((1, 6, 7), (1, 6, 8), 2)],
            id="the next has more in common with the one after",
        ),
        pytest.param([(1, 2, 3), (1, 2, 4)], 4, [((1, 2, 3), (1, 2, 4), 2)], id="no more than the most tokens"),
        pytest.param([(1, 2, 3), (1, 2, 4)], 3, [], id="too many together"),
        pytest.param([], None, [], id="none"),
    ],
)
def test_neighbours(sequences, most_tokens, expected):
    found = neighbours(sequences, most_tokens)
    assert [(pair.first, pair.second, pair.shared) for pair in found] == expected
    assert [len(pair) for pair in found] == [len({*first, *second}) for first, second, _ in expected]


def test_a_model_that_cannot_share_is_refused_when_it_must(save_encoder):
    folder = save_encoder("bert", AutoModelForSequenceClassification, num_labels=1)
    assert not load_reward_model(str(folder), device="cpu").reads_packed_pairs
    with pytest.raises(InputError, match=r"--share_prompt on: .*: bert is none of the models"):
        load_reward_model(str(folder), device="cpu", share_prompt="on")


def test_equal_sequences_are_tied_in_any_batch(student_path, sequences):
    model = load_reward_model(str(student_path), device="cpu")
    several = [*sequences, *reversed(sequences)]
    rewards = model.rewards(several, batch_size=3, show_progress=False)
    assert rewards == rewards[::-1]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
def test_an_encoder_with_one_label_is_scored_too(save_encoder, model_type, eval_pairs_path):
    folder = save_encoder(model_type, AutoModelForSequenceClassification, num_labels=1)
    model = load_reward_model(str(folder), dtype="float64", device="cpu")
    pairs, _ = load_preferences(str(eval_pairs_path))
    texts = [model.encode(pair["chosen"], pair["conversational"]) for pair in pairs]
    with torch.no_grad():
        expected = [model.model(torch.tensor([ids])).logits.item() for ids in texts]
    assert model.rewards(texts, batch_size=4, show_progress=False) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("max_length", [256, 24])
@pytest.mark.parametrize("chat_template", [None, TEMPLATE])
def test_a_model_reads_what_training_feeds_it(variant, eval_pairs_path, chat_template, max_length):
    model = load_reward_model(str(variant(chat_template=chat_template)), device="cpu", max_length=max_length)
    encoder = PairEncoder(model.tokenizer, None, max_length=max_length, teacher_max_length=8)
    pairs, _ = load_preferences(str(eval_pairs_path))
    for pair in pairs:
        expected = encoder(pair)
        both = model.encode_pair(pair["chosen"], pair["rejected"], pair["conversational"])
        assert both == (expected["chosen_input_ids"], expected["rejected_input_ids"])
        alone = model.encode(pair["rejected"], pair["conversational"])
        assert len(alone) <= max_length
        # A rejected sequence by itself keeps at least what it keeps beside a chosen one, the beginning apart.
        assert alone[1:][-len(both[1]) + 1 :] == both[1][1:]
        assert alone[0] == model.tokenizer.bos_token_id
    assert max_length == 256 or any(encoder(pair)["cut_student"] for pair in pairs)


def test_what_the_template_refuses_is_said(variant):
    model = load_reward_model(str(variant(chat_template=TEMPLATE)), device="cpu")
    with pytest.raises(TemplateRefusal, match="no system role"):
        model.encode([{"role": "system", "content": "Be brief."}], True)


def test_a_language_model_is_refused(tmp_path, student_path):
    LlamaForCausalLM.from_pretrained(student_path).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(student_path).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a language model \(LlamaForCausalLM\).*--implicit_reward"):
        load_reward_model(str(tmp_path), device="cpu")


def test_a_checkpoint_without_its_reward_head_is_refused(variant):
    folder = variant()
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of .*, among them score\.weight"):
        load_reward_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, {}, "is a classifier of 2 labels; a reward model has one"),
        ({}, {"max_length": 300}, "--max_length 300: the model reads 256 tokens at most"),
        ({}, {"max_length": 2}, "--max_length: expected at least 8 tokens, got 2"),
        ({}, {"dtype": "int8"}, "--dtype int8: expected one of float32"),
    ],
)
def test_what_cannot_be_scored_is_one_line(variant, config, arguments, message):
    with pytest.raises(InputError, match=message):
        load_reward_model(str(variant(**config)), device="cpu", **arguments)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_files_that_are_not_there_are_one_line(variant, missing):
    folder = variant()
    (folder / missing).unlink()
    with pytest.raises(InputError) as refusal:
        load_reward_model(str(folder), device="cpu")
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"\./nowhere: no such folder"):
        load_reward_model("./nowhere", device="cpu")
