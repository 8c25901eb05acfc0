"""The student's pad token, its reward head, and saving."""

import json
from datetime import date

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from idrm.arguments import ModelArguments
from idrm.checkpointing import save_model
from idrm.errors import InputError
from idrm.models import load_student, load_student_config, load_student_tokenizer


@pytest.fixture
def variant(tmp_path, student_path, student_tokenizer):
    """variant(pad_token=..., added=[...]): the tiny student with another tokenizer."""

    def make(*, pad_token=None, added=(), chat_template=None, weights=student_path):
        tokenizer = AutoTokenizer.from_pretrained(student_path)
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
        tokenizer.pad_token = pad_token
        tokenizer.chat_template = chat_template
        AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1).save_pretrained(tmp_path / "student")
        tokenizer.save_pretrained(tmp_path / "student")
        return str(tmp_path / "student")

    return make


def load(path, **arguments):
    arguments = ModelArguments(model_name_or_path=path, **arguments)
    tokenizer = load_student_tokenizer(arguments)
    return load_student(arguments, load_student_config(arguments), tokenizer), tokenizer


def test_a_pad_token_that_is_eos_is_refused_with_the_remedy(variant):
    path = variant(pad_token="</s>")
    with pytest.raises(InputError, match=r"its pad token is its EOS token '</s>'.*--pad_token"):
        load(path)
    _, tokenizer = load(path, pad_token="<|mine|>")
    assert tokenizer.pad_token == "<|mine|>"


def test_a_reserved_pad_token_is_used_where_none_is_named(variant, student_tokenizer):
    model, tokenizer = load(variant(added=["<|finetune_right_pad_id|>"]))
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == len(student_tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(student_tokenizer) + 1


def test_a_pad_token_is_added_where_the_vocabulary_has_none(tmp_path, variant):
    path = variant()
    files = {name: (tmp_path / "student" / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, text in files.items():
        (tmp_path / "student" / name).write_text(text.replace("<|pad|>", "<|unused|>"))
    before = AutoModelForSequenceClassification.from_pretrained(path)
    model, tokenizer = load(path)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == before.config.vocab_size
    assert model.config.vocab_size == before.config.vocab_size + 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight[: before.config.vocab_size]
    assert torch.equal(rows, before.get_input_embeddings().weight)


def test_a_language_model_gets_one_reward_head(tmp_path, student_path, caplog):
    LlamaForCausalLM.from_pretrained(student_path).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(student_path).save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="idrm"):
        model, _ = load(str(tmp_path))
    assert model.score.weight.shape[0] == 1
    assert model.config.num_labels == 1
    assert "score.weight" in caplog.text


def test_a_classifier_of_several_labels_is_refused(tmp_path, student_path):
    model = AutoModelForSequenceClassification.from_pretrained(student_path, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a classifier of 3 labels"):
        load_student_config(ModelArguments(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("loading", [load_student_config, load_student_tokenizer])
def test_what_is_not_there_is_one_line(loading):
    with pytest.raises(InputError, match=r"--model_name_or_path \./nowhere: ") as refusal:
        loading(ModelArguments(model_name_or_path="./nowhere"))
    assert "\n" not in str(refusal.value)


def test_half_a_weights_file_is_one_line(tmp_path, variant):
    path = variant(pad_token="<|pad|>")
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="--model_name_or_path"):
        load(path)


def test_an_unknown_attention_implementation_is_refused(student_path):
    with pytest.raises(InputError, match="ring_attention"):
        load(str(student_path), attn_implementation="ring_attention")


def test_weights_that_are_no_safetensors_are_refused(tmp_path, variant):
    path = variant(pad_token="<|pad|>")
    weights = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    torch.save(weights, tmp_path / "student" / "pytorch_model.bin")
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load(path)


def test_saving_gives_a_model_that_loads_by_itself(tmp_path, student_path):
    model, tokenizer = load(str(student_path))
    folder = tmp_path / "saved"
    (folder / ".saving").mkdir(parents=True)
    (folder / ".saving" / "left by a killed run").touch()
    for _ in range(2):  # over an earlier save too
        save_model(model, tokenizer, folder)
        assert not list(folder.glob(".saving*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert len(config["id2label"]) == 1
    assert not list(folder.rglob("*.bin"))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_saved_chat_template_does_not_render_today(tmp_path, variant):
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    model, tokenizer = load(variant(pad_token="<|pad|>", chat_template=template))
    save_model(model, tokenizer, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = saved.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.endswith("[user]Hello")
    assert f"{date.today():%d %b %Y}" not in text
