"""Heads, labels and pooling of every family, and what is saved."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from idrm.capture import Teacher
from idrm.checkpointing import save_model
from idrm.errors import InputError
from idrm.nli import load_classifier, load_classifier_config, load_classifier_tokenizer
from idrm.nli.classifier import classifier_labels, longest_input, reads_token_types

LABELS = ("entailment", "neutral", "contradiction")


def load(folder, labels=LABELS, **options):
    return load_classifier(str(folder), load_classifier_config(str(folder)), labels, **options)


def padded_batch(folder, side="right"):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    config = load_classifier_config(str(folder))
    premises = ["The kettle boils quickly.", "A lamp."]
    hypotheses = ["Please confirm the price of the green order tomorrow.", "A city reads."]
    types = reads_token_types(config, tokenizer)
    return tokenizer(premises, hypotheses, padding=True, return_tensors="pt", return_token_type_ids=types)


def logits_by_hand(model, pooled):
    """What each class makes of a pooled state, after transformers' own code, without dropout."""
    kind = model.config.model_type
    if kind == "bert":
        return model.classifier(model.bert.pooler.activation(model.bert.pooler.dense(pooled)))
    if kind in ("deberta", "deberta-v2"):
        return model.classifier(torch.nn.functional.gelu(model.pooler.dense(pooled)))
    if kind == "distilbert":
        return model.classifier(torch.relu(model.pre_classifier(pooled)))
    if kind == "modernbert":
        return model.classifier(model.head(pooled))
    activation = torch.nn.functional.gelu if kind == "electra" else torch.tanh
    return model.classifier.out_proj(activation(model.classifier.dense(pooled)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_is_the_one_written_by_hand(save_encoder, encoder_type, pooling):
    model = load(save_encoder(encoder_type), pooling=pooling).double().eval()
    assert model.config.classifier_pooling == pooling
    batch = padded_batch(model.config._name_or_path)
    with torch.no_grad():
        logits = model(**batch).logits
        states = model.base_model(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch["attention_mask"].double()
        mean = torch.stack([row[: int(length)].mean(0) for row, length in zip(states, mask.sum(1), strict=True)])
        expected = logits_by_hand(model, mean if pooling == "mean" else states[:, 0])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        alone = {name: value[1:, : int(mask[1].sum())] for name, value in batch.items()}
        rounding = 1e-5 if encoder_type == "modernbert" else 1e-9  # its rotary angles are float32
        torch.testing.assert_close(model(**alone).logits, logits[1:], rtol=rounding, atol=rounding)


def test_mean_pooling_without_a_mask_takes_all_tokens(save_encoder):
    model = load(save_encoder("roberta"), pooling="mean").eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        masked = model(ids, torch.ones_like(ids)).logits
        torch.testing.assert_close(model(ids).logits, masked)
        assert not torch.allclose(model(ids, torch.tensor([[1, 1, 1, 0]])).logits, masked)


def test_a_step_of_training_and_what_is_saved(save_encoder, encoder_type, make_trainer, tmp_path, caplog):
    folder = save_encoder(encoder_type)
    flags = ("--max_steps", 1, "--warmup_steps", 0, "--learning_rate", "1e-3", "--save_strategy", "no")
    trainer = make_trainer(folder, *flags, pooling="mean")
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_pairs"] == 29
    same = [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])]
    assert [name for name in same if "position_embeddings" not in name and "token_type" not in name] == []
    trainer.save_model()
    out = tmp_path / "out"
    assert not list(out.rglob("*.bin"))
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", LABELS, strict=True))
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}
    assert config["classifier_pooling"] == "mean"
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert plain.config.num_labels == 3
    again, batch = load(out).eval(), padded_batch(out)  # the pooling of the config is honoured
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)
    with caplog.at_level("WARNING", logger="idrm"):
        Teacher.load(str(out), layers=[0])  # ModernBERT's last layer is local
    assert "no NLI classifier" not in caplog.text


def test_a_head_for_the_same_labels_is_kept(save_encoder, encoder_type, caplog):
    names = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    label2id = {name: index for index, name in names.items()}
    folder = save_encoder(encoder_type, AutoModelForSequenceClassification, id2label=names, label2id=label2id)
    config = load_classifier_config(str(folder))
    labels = classifier_labels(config)
    assert labels == ("contradiction", "entailment", "neutral")
    with caplog.at_level("INFO", logger="idrm"):
        model = load_classifier(str(folder), config, labels)
    assert "its head is kept" in caplog.text
    assert model.config.id2label == names
    expected = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("others", [("negative", "positive"), ("joy", "anger", "fear"), LABELS[::-1]])
def test_a_head_for_other_labels_makes_room(save_encoder, encoder_type, others, caplog):
    names = dict(enumerate(others))
    label2id = {name: index for index, name in names.items()}
    folder = save_encoder(encoder_type, AutoModelForSequenceClassification, id2label=names, label2id=label2id)
    with caplog.at_level("INFO", logger="idrm"):
        model = load(folder)
    assert f"The head of the checkpoint, for {', '.join(others)}, makes room" in caplog.text
    assert model.config.id2label == dict(enumerate(LABELS))
    old = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    changed = {
        name
        for name, weight in model.state_dict().items()
        if weight.shape != old[name].shape or not torch.equal(weight, old[name])
    }
    assert {name.removeprefix("classifier.").removeprefix("out_proj.") for name in changed} <= {"weight", "bias"}
    assert model.eval()(**padded_batch(folder)).logits.shape == (2, 3)
    output = model.classifier.out_proj if hasattr(model.classifier, "out_proj") else model.classifier
    assert output.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert not output.bias.any()


def test_a_base_checkpoint_gets_a_head(save_encoder, encoder_type, caplog):
    folder = save_encoder(encoder_type)
    with caplog.at_level("INFO", logger="idrm"):
        model = load(folder, ("entailment", "not_entailment"))
    assert "Newly initialised" in caplog.text
    assert "classifier" in caplog.text
    assert model.config.num_labels == 2
    encoder = AutoModel.from_pretrained(folder).state_dict()
    kept = {name.removeprefix(f"{model.base_model_prefix}."): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(kept[name], weight) for name, weight in encoder.items() if name in kept)


def test_an_encoder_without_its_weights_is_refused(save_encoder, encoder_type):
    """Only what belongs to a head may be missing: a checkpoint of other names would leave a random encoder."""
    folder = save_encoder(encoder_type)
    weights = load_file(folder / "model.safetensors")
    last = sorted(name for name in weights if "pooler" not in name and name.endswith("weight"))[-1]
    weights[f"alien.{last}"] = weights.pop(last)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"--model_name_or_path .*: the checkpoint lacks 1 weights of .*ForSequenceClassification, among them .*"
    with pytest.raises(InputError, match=message + re.escape(last)):
        load(folder)
    with pytest.raises(InputError, match=r"^teacher two: the checkpoint lacks 1 weights"):
        load(folder, whose="teacher two")


def test_a_head_without_its_weights_is_refused_where_none_may_be_new(save_encoder, encoder_type):
    label2id = {name: index for index, name in enumerate(LABELS)}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": label2id}
    folder = save_encoder(encoder_type, AutoModelForSequenceClassification, **names)
    assert load(folder, new_head=False).config.num_labels == 3
    with pytest.raises(InputError, match="it has one for entailment, neutral, contradiction"):
        load(folder, LABELS[::-1], new_head=False)
    weights = load_file(folder / "model.safetensors")
    head = sorted(name for name in weights if "classifier" in name)
    for name in head:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"has no whole head for .*: the checkpoint lacks {', '.join(head)}"):
        load(folder, new_head=False)
    assert load(folder).config.num_labels == 3


def test_the_limit_of_a_family(save_encoder):
    limits = {"bert": 128, "roberta": 127, "deberta-v2": None, "modernbert": 128}
    assert {kind: longest_input(load_classifier_config(str(save_encoder(kind)))) for kind in limits} == limits


def test_a_pooling_that_the_config_names_wrongly(save_encoder):
    folder = save_encoder("bert", classifier_pooling="max")
    with pytest.raises(InputError, match="classifier_pooling 'max'; expected one of"):
        load(folder)
    assert load(folder, pooling="cls").config.classifier_pooling == "cls"


def test_a_decoder_is_refused(student_path, save_encoder):
    with pytest.raises(InputError, match=r"is no encoder that can teach \(llama\); expected one of bert, camembert"):
        load_classifier_config(str(student_path))
    with pytest.raises(InputError, match=r"is no encoder that can teach \(bert\)"):
        load_classifier_config(str(save_encoder("bert", is_decoder=True)))


def test_what_cannot_be_loaded_is_one_line(save_encoder, tmp_path):
    folder = save_encoder("bert")
    with pytest.raises(InputError, match=r"--model_name_or_path \./nowhere: no such folder"):
        load_classifier_config("./nowhere")
    with pytest.raises(InputError, match=r"^--compare_with \./nowhere: no such folder"):
        load_classifier_config("./nowhere", whose="--compare_with ./nowhere")
    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors") as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_an_attention_that_is_unknown_names_its_flag(save_encoder, encoder_type):
    folder = save_encoder(encoder_type)
    with pytest.raises(InputError, match=r"^--attn_implementation ring_attention: "):
        load(folder, attn_implementation="ring_attention")
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_tokenizer_pads_on_the_right_or_is_refused(save_encoder):
    folder = save_encoder("bert")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    assert load_classifier_tokenizer(str(folder)).padding_side == "right"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no pad token"):
        load_classifier_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_classifier_tokenizer(str(folder))


def test_saving_over_a_teacher_leaves_a_whole_one(save_encoder, tmp_path):
    folder = save_encoder("bert", AutoModelForSequenceClassification)
    shutil.copytree(folder, tmp_path / "saved")
    model, tokenizer = load(folder), load_classifier_tokenizer(str(folder))
    save_model(model, tokenizer, tmp_path / "saved")
    assert classifier_labels(load_classifier_config(str(tmp_path / "saved"))) == LABELS
