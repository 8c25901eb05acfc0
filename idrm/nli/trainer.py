"""transformers' Trainer for NLI classifiers: means over pairs, whatever the batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from idrm.checkpointing import CheckpointingTrainer
from idrm.errors import InputError
from idrm.nli.evaluation import classification_metrics


class NliTrainer(CheckpointingTrainer):
    """Trains a classifier of NLI; evaluation gives loss (cross-entropy), accuracy, macro_f1 and accuracy_<label>.

    Args:
        model: from `load_classifier`.
        args: transformers' arguments.
        train_dataset, eval_dataset: from `encode_nli`.
        processing_class: the tokenizer, saved beside the model.
        labels: names in the order of the logits.
        early_stopping_patience: evaluations without a better metric_for_best_model that end the training; 0 for none.

    Raises:
        InputError: in an evaluation, a loss that is not finite.
    """

    loss_is_scaled_for_ga = False  # the model's loss is the mean over the pairs of one micro-batch

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        *,
        processing_class: PreTrainedTokenizerBase,
        labels: Sequence[str],
        early_stopping_patience: int = 0,
    ):
        self.labels = tuple(labels)
        super().__init__(
            model,
            args,
            DataCollatorWithPadding(processing_class),
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=self._evaluation_metrics,
            callbacks=[EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else None,
        )
        # The classifiers take the number of items in a batch and ignore it; Trainer would multiply by the ranks.
        self.model_accepts_loss_kwargs = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Without the batch's loss, whose mean over batches would weigh the pairs of a short one more."""
        _, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return None, logits, labels

    def _run_epoch(self, *args, **kwargs) -> None:
        """Nothing where the checkpoint to go on from is the one at which the run had stopped early."""
        stopping = [part for part in self.callback_handler.callbacks if isinstance(part, EarlyStoppingCallback)]
        if any(part.early_stopping_patience_counter >= part.early_stopping_patience for part in stopping):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, Any]:
        logits, references = prediction.predictions, prediction.label_ids
        loss = cross_entropy(torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(references))
        if not loss.isfinite():
            raise InputError(
                f"--learning_rate {self.args.learning_rate:g}: the loss of an evaluation is {loss.item()} after "
                f"{self.state.global_step} steps: the training has diverged; give a lower one"
            )
        return {
            "loss": loss.item(),
            **classification_metrics(logits.argmax(-1), references, self.labels),
            "pairs": len(references),
        }
