"""How well a classifier does on NLI: accuracy, overall and per label, and macro F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.progress import track
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from idrm.errors import InputError


def metric_names(labels: Sequence[str]) -> list[str]:
    """What `classification_metrics` returns, in its order."""
    return ["accuracy", "macro_f1", *(f"accuracy_{_as_name(label)}" for label in labels)]


def classification_metrics(predictions: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro F1, and the accuracy on the pairs of each label (its recall).

    Args:
        predictions, references: (pairs,) integers, positions in `labels`.
        labels: names of the labels.

    Returns:
        accuracy, macro_f1 (the mean over the labels that are predicted or present) and accuracy_<label>, the last only
        for labels that are present.
    """
    metrics = {"accuracy": float((predictions == references).mean())}
    recalls, f1 = {}, []
    for index, label in enumerate(labels):
        predicted, present = predictions == index, references == index
        both = int((predicted & present).sum())
        if present.any():
            recalls[f"accuracy_{_as_name(label)}"] = both / int(present.sum())
        if predicted.any() or present.any():
            f1.append(2 * both / (int(predicted.sum()) + int(present.sum())))
    return {**metrics, "macro_f1": float(np.mean(f1)), **recalls}


@torch.no_grad()
def evaluate_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    length_column: str = "length",
    show_progress: bool = True,
) -> dict[str, Any]:
    """How any loaded classifier does on encoded pairs, batched by length on the model's device.

    Args:
        model: a classifier whose logits follow `labels`; its mode is restored.
        pairs: from `encode_nli`.

    Raises:
        InputError: logits that are not finite.

    Returns:
        {"accuracy": share, "macro_f1": share, "examples": count, "per_label": {label: {"accuracy", "examples"}}}, with
        the labels that are present.
    """
    order = np.argsort(np.asarray(pairs[length_column][:]), kind="stable")
    inputs = pairs.remove_columns([length_column, "label"])
    references = np.asarray(pairs["label"][:])
    predictions = np.empty_like(references)
    collate = DataCollatorWithPadding(tokenizer)
    was_training = model.training
    model.eval()
    starts = range(0, len(order), batch_size)
    for start in track(starts, "Evaluating", disable=not show_progress, transient=True):
        rows = order[start : start + batch_size]
        batch = collate([inputs[int(row)] for row in rows]).to(model.device)
        logits = model(**batch).logits
        if not logits.isfinite().all():
            raise InputError(f"{model.name_or_path}: its logits are not finite: its training has diverged")
        predictions[rows] = logits.argmax(-1).cpu().numpy()
    model.train(was_training)
    metrics = classification_metrics(predictions, references, labels)
    return {
        **{name: metrics[name] for name in ("accuracy", "macro_f1")},
        "examples": len(references),
        "per_label": {
            label: {"accuracy": metrics[f"accuracy_{_as_name(label)}"], "examples": int((references == index).sum())}
            for index, label in enumerate(labels)
            if (references == index).any()
        },
    }


def _as_name(label: str) -> str:
    return label.replace(" ", "_").replace("-", "_")
