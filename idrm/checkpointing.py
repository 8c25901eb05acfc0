"""Models and checkpoints that are whole or not there, whenever a run is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state_dict: dict | None = None
) -> None:
    """Saves weights (safetensors), tokenizer and chat template so that ``folder`` holds a whole model or none.

    Files are written to a folder of their own and renamed, config.json last: without it nothing loads.
    """
    written = folder / ".saving"  # one name, so that what a killed run left goes with the next save
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    model.save_pretrained(written, state_dict=state_dict)
    tokenizer.save_pretrained(written)
    for path in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    written.rmdir()


class CheckpointingTrainer(Trainer):
    """transformers' Trainer: saves by `save_model`, and writes trainer_state.json once every rank's files are there.

    That file then tells that a checkpoint is complete (`idrm.run_folder.resume_checkpoint`).
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_model(self.accelerator.unwrap_model(self.model), self.processing_class, folder, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Next, the first rank writes the trainer state.
        self.accelerator.wait_for_everyone()

    def report(self, split: str, metrics: dict[str, float]) -> None:
        """Prints the metrics of a split and saves them, also to all_results.json."""
        self.log_metrics(split, metrics)
        self.save_metrics(split, metrics)
