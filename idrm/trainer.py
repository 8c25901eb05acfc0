"""transformers' Trainer for preference pairs: a preference objective plus alpha times the interaction loss."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import seed_worker

from idrm.arguments import RewardTrainingArguments
from idrm.capture.student import QueryKeyCapture
from idrm.checkpointing import CheckpointingTrainer
from idrm.collator import PairCollator
from idrm.interaction import InteractionLoss, TeacherAttention
from idrm.metrics import COLUMNS, metrics_from_sums, pair_rows
from idrm.objectives import GaussianBottleneck, PreferenceLoss
from idrm.objectives.bottleneck import head_name, with_folded_head
from idrm.objectives.pair_order import ORDER_COLUMN
from idrm.shared_prompts import TokenBatches, TokenBatchSampler
from idrm_kernels import PackedAttention


class RewardTrainer(CheckpointingTrainer):
    """Trains a sequence classifier with one label as a reward model.

    Training records and evaluations hold loss, preference_loss, accuracy, margin, mean_reward and
    reward_length_correlation, with an interaction loss interaction_loss, intra_loss, inter_loss (before alpha) and
    interaction_ratio, and with a bottleneck latent_kl. Training records are means over all pairs since the last record,
    of all ranks; evaluations are means over the pairs of the set, whatever the batch size and the number of ranks.

    Args:
        model: the student.
        args: see RewardTrainingArguments.
        data_collator: makes batches of the encoded pairs.
        train_dataset, eval_dataset: encoded pairs; several evaluation sets as a dict by name.
        processing_class: the student's tokenizer, saved beside the model.
        interaction: None for Bradley-Terry alone.
        alpha: weight of the interaction loss.
        preference_loss: of the rewards; Bradley-Terry by default.
        bottleneck_weight: weight of the KL divergences of a bottleneck that the model has in the place of its reward
            head (`idrm.objectives.attach_bottleneck`). What is saved has a plain head of the same rewards; checkpoints
            have the bottleneck's weights too.
        token_batches: the micro-batches of train_dataset, in the place of those of per_device_train_batch_size pairs.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the pairs of one micro-batch

    def __init__(
        self,
        model: PreTrainedModel,
        args: RewardTrainingArguments,
        data_collator: PairCollator,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        interaction: InteractionLoss | None = None,
        alpha: float = 1.0,
        preference_loss: PreferenceLoss | None = None,
        bottleneck_weight: float = 0.0,
        token_batches: TokenBatches | None = None,
        **trainer_arguments: Any,
    ):
        self.interaction = interaction
        self.alpha = alpha
        self.preference_loss = preference_loss or PreferenceLoss()
        self.bottleneck_weight = bottleneck_weight
        self.token_batches = token_batches
        self.bottleneck = next((module for module in model.modules() if isinstance(module, GaussianBottleneck)), None)
        self.capture = QueryKeyCapture(model, interaction.student_layers) if interaction else None
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=self._evaluation_metrics,
            **trainer_arguments,
        )
        self.can_return_loss = True  # there are no labels to evaluate without
        self._sums = torch.zeros(len(COLUMNS), dtype=torch.float64, device=args.device)

    def get_train_dataloader(self) -> DataLoader:
        """Of `token_batches` where they are given; transformers has no way to name a batch sampler."""
        if self.token_batches is None:
            return super().get_train_dataloader()
        args = self.args
        seeded = functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=TokenBatchSampler(self.token_batches.batches, args.world_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=seeded,
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: RewardTrainingArguments) -> int:
        """Pairs an optimizer step, of `token_batches` in the mean: by them the Trainer reports its speed."""
        if self.token_batches is None:
            return super().get_total_train_batch_size(args)
        return round(self.token_batches.mean_pairs * args.gradient_accumulation_steps * args.world_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The training loss of a micro-batch of B pairs: a mean over them, of `token_batches` times B / mean B."""
        teacher_of_batch = self._begin_teacher(inputs)
        rewards, student = self._forward(model, inputs)
        if self.preference_loss.confidence_weight and ORDER_COLUMN not in inputs:
            raise ValueError("a confidence loss does nothing without the order that `draw_pair_order` draws")
        preference = self.preference_loss(
            rewards,
            inputs.get("margin", 0.0),
            chosen_is_first=inputs.get(ORDER_COLUMN),
            progress=self.state.global_step / max(1, self.state.max_steps),
        )
        latent_kl = self._latent_kl(inputs)
        interaction = uniform = None
        loss = preference.mean() + self._centering(rewards).mean()
        if latent_kl is not None:
            loss = loss + self.bottleneck_weight * latent_kl.mean()
        if self.interaction:
            batch = inputs["interaction"]
            teacher = teacher_of_batch()
            interaction = self.interaction.batch_loss(student, teacher, batch)
            loss = loss + self.alpha * interaction.loss
            if self._is_logging_step():
                with torch.no_grad():
                    uniform_student = self.interaction.uniform_attention(student)
                    uniform = self.interaction.batch_loss(uniform_student, teacher, batch).loss
        rows = pair_rows(rewards, inputs["lengths"], loss, preference, interaction, uniform, latent_kl)
        self._sums += rows.sum(0)
        if self.token_batches is not None:
            # Accumulation and ranks take means over micro-batches, in which each pair is to weigh the same.
            loss = loss * (rewards.shape[1] / self.token_batches.mean_pairs)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One row of metrics.COLUMNS a pair, as the "logits" that the evaluation loop gathers and deduplicates."""
        inputs = self._prepare_inputs(inputs)
        teacher_of_batch = self._begin_teacher(inputs)
        rewards, student = self._forward(model, inputs)
        preference = self.preference_loss(rewards, inputs.get("margin", 0.0))
        latent_kl = self._latent_kl(inputs)
        interaction = uniform = None
        loss = preference + self._centering(rewards)
        if latent_kl is not None:
            loss = loss + self.bottleneck_weight * latent_kl
        if self.interaction:
            batch = inputs["interaction"]
            teacher = teacher_of_batch()
            interaction = self.interaction.pair_losses(student, teacher, batch)
            uniform = self.interaction.pair_losses(self.interaction.uniform_attention(student), teacher, batch).loss
            loss = loss + self.alpha * interaction.loss
        rows = pair_rows(rewards, inputs["lengths"], loss, preference, interaction, uniform, latent_kl)
        # The loop computes metrics only where there are labels; these say that each row is one pair.
        return None, rows, rows.new_ones(len(rows))

    def _prepare_input(self, data):
        """On the device, in its own dtype: of a batch no float goes into the model, and margins are not to be rounded.

        transformers casts floats to DeepSpeed's half precision.
        """
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the pairs' means since the last record to a training record, whose loss they replace."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs.update(self._metrics(sums))
            self._sums.zero_()
        super().log(logs, start_time)

    def _begin_teacher(self, inputs) -> Callable[[], list[TeacherAttention]] | None:
        """Started before the student, so that the two run side by side where there are streams."""
        return self.interaction.begin_teacher(inputs["interaction"]) if self.interaction else None

    def _forward(self, model, inputs) -> tuple[Tensor, list[PackedAttention]]:
        """Rewards (2, B) float32 of chosen and rejected, and the supervised blocks' content tokens."""
        with self.capture.recording() if self.capture else contextlib.nullcontext():
            names = ("packed_pairs",) if "packed_pairs" in inputs else ("input_ids", "attention_mask")
            logits = model(**{name: inputs[name] for name in names}).logits
        rewards = logits.float().view(2, -1)
        if not self.interaction:
            return rewards, []
        return rewards, self.interaction.student_attention(self.capture.take(), inputs["interaction"])

    def _latent_kl(self, inputs: dict[str, Any]) -> Tensor | None:
        """KL divergence of both sequences' latents, (B,), of the forward just made; None without a bottleneck."""
        if self.bottleneck is None:
            return None
        divergence = self.bottleneck.take_divergence()
        if "packed_pairs" not in inputs:
            # Of every token; the collator pads on the right, so that the pooled one is the last of its sequence.
            divergence = divergence.gather(1, inputs["lengths"].view(-1, 1) - 1)
        return divergence.view(2, -1).sum(0)

    def _centering(self, rewards: Tensor) -> Tensor:
        """TRL's penalty on rewards away from zero, (B,)."""
        return (self.args.center_rewards_coefficient or 0.0) * rewards.sum(0).square()

    def _is_logging_step(self) -> bool:
        """Whether the optimizer step under way ends in a record; only then is the uniform map worth its time."""
        step = self.state.global_step + 1
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = prediction.predictions.sum(axis=0).tolist()
        return {**self._metrics(sums), "pairs": len(prediction.predictions)}

    def _metrics(self, sums: list[float]) -> dict[str, float]:
        return metrics_from_sums(
            sums, with_interaction=self.interaction is not None, with_bottleneck=self.bottleneck is not None
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves a plain sequence classifier; checkpoints, from which a run goes on, have a bottleneck's weights too."""
        if self.bottleneck is not None and self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            is_checkpoint = output_dir is not None and Path(output_dir) != Path(self.args.output_dir)
            state_dict = with_folded_head(
                model.state_dict() if state_dict is None else state_dict,
                head_name(model),
                keep_bottleneck=is_checkpoint,
            )
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random states, each rank keeps its sums since the last record: a resumed run logs the same."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._sums_file(output_dir).write_text(json.dumps(self._sums.tolist()))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._sums_file(checkpoint).is_file():
            sums = json.loads(self._sums_file(checkpoint).read_text())
            self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))

    def _sums_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"metric_sums_{self.args.process_index}.json")
