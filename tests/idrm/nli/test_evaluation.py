"""Metrics against counts made by hand, and the evaluation of a loaded classifier."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from idrm.errors import InputError
from idrm.nli import encode_nli, evaluate_classifier, load_classifier_tokenizer, load_nli
from idrm.nli.evaluation import classification_metrics, metric_names

LABELS = ("entailment", "neutral", "contradiction")


def test_metrics_are_those_counted_by_hand():
    references = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 0, 2, 0])
    metrics = classification_metrics(predictions, references, LABELS)
    assert list(metrics) == metric_names(LABELS)
    assert metrics == pytest.approx(
        {
            "accuracy": 5 / 8,
            "accuracy_entailment": 3 / 4,
            "accuracy_neutral": 1 / 2,
            "accuracy_contradiction": 1 / 2,
            # precision and recall: 3/5 and 3/4, 1/2 and 1/2, 1 and 1/2
            "macro_f1": (2 / 3 + 1 / 2 + 2 / 3) / 3,
        }
    )


def test_a_label_that_is_absent_has_no_accuracy():
    metrics = classification_metrics(np.array([0, 1]), np.array([0, 0]), ("entailment", "not entailment"))
    assert metrics == pytest.approx({"accuracy": 0.5, "accuracy_entailment": 0.5, "macro_f1": 1 / 3})
    assert metric_names(("entailment", "not-entailment"))[-1] == "accuracy_not_entailment"


def test_an_evaluation_is_the_pairs_one_by_one(teacher_path, eval_nli_path):
    tokenizer = load_classifier_tokenizer(str(teacher_path))
    model = AutoModelForSequenceClassification.from_pretrained(teacher_path).train()
    pairs = load_nli(str(eval_nli_path))[0]
    encoded, cut = encode_nli(pairs, tokenizer, max_length=64, token_types=True)
    assert cut == 0
    metrics = evaluate_classifier(model, tokenizer, encoded, LABELS, batch_size=4, show_progress=False)
    assert model.training
    model.eval()
    hits = []
    for pair in pairs:
        with torch.no_grad():
            logits = model(**tokenizer(pair["premise"], pair["hypothesis"], return_tensors="pt")).logits
        hits.append((pair["label"], logits.argmax().item()))
    assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in hits) / 29)
    for index, label in enumerate(LABELS):
        own = [a == b for a, b in hits if a == index]
        assert metrics["per_label"][label] == pytest.approx({"accuracy": sum(own) / len(own), "examples": len(own)})
    assert metrics["examples"] == 29


def test_logits_that_are_not_finite_are_no_predictions(teacher_path, eval_nli_path):
    tokenizer = load_classifier_tokenizer(str(teacher_path))
    model = AutoModelForSequenceClassification.from_pretrained(teacher_path)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    encoded, _ = encode_nli(load_nli(str(eval_nli_path))[0], tokenizer, max_length=64, token_types=True)
    with pytest.raises(InputError, match=f"{teacher_path}: its logits are not finite"):
        evaluate_classifier(model, tokenizer, encoded, LABELS, show_progress=False)


def test_what_is_too_long_loses_tokens_of_its_longer_side_and_is_counted(teacher_path, eval_nli_path):
    tokenizer = load_classifier_tokenizer(str(teacher_path))
    pairs = load_nli(str(eval_nli_path))[0]
    whole = tokenizer(pairs["premise"][:], pairs["hypothesis"][:])["input_ids"]
    encoded, cut = encode_nli(pairs, tokenizer, max_length=16, token_types=False)
    assert "token_type_ids" not in encoded.column_names
    assert cut == sum(len(ids) > 16 for ids in whole) > 0
    for ids, full, length in zip(encoded["input_ids"], whole, encoded["length"], strict=True):
        assert length == len(ids) == min(len(full), 16)
        hypothesis = full[full.index(3) + 1 :]
        if len(hypothesis) <= 6:
            assert ids[-len(hypothesis) :] == hypothesis
    assert tokenizer.backend_tokenizer.truncation is None


def test_the_trainer_evaluates_the_mean_over_pairs_whatever_the_batch(make_trainer, teacher_path):
    results = []
    for size in (3, 64):
        trainer = make_trainer(teacher_path, "--per_device_eval_batch_size", size)
        results.append(trainer.evaluate())
    model, pairs = trainer.model.eval(), trainer.eval_dataset
    losses = []
    for pair in pairs:
        with torch.no_grad():
            names = ("input_ids", "attention_mask", "token_type_ids")
            logits = model(**{name: torch.tensor([pair[name]]) for name in names}).logits
        losses.append(cross_entropy(logits, torch.tensor([pair["label"]])).item())
    for result in results:
        assert result["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(results[1]) >= {f"eval_{name}" for name in ("loss", "pairs", *metric_names(LABELS))}


def test_micro_batches_are_one_batch(make_trainer, teacher_path):
    """The gradient is the mean over the pairs of a step, however it is divided."""
    weights = []
    flags = ("--max_steps", 2, "--warmup_steps", 0, "--save_strategy", "no", "--eval_strategy", "no")
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            teacher_path,
            *flags,
            *("--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps),
            # Plain gradient descent shows a gradient of another size; Adam would not.
            *("--optim", "sgd", "--learning_rate", 0.1, "--max_grad_norm", 0),
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.config.attention_probs_dropout_prob = 0.0
        for layer in trainer.model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)
