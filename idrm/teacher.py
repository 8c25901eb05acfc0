"""Fine-tunes an encoder on NLI, which makes it a teacher, or examines one: the entry point, from flags to saved model.

idrm teacher [flags]
python idrm/teacher.py [flags]
deepspeed idrm/teacher.py --deepspeed ds_zero3.json [flags]
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started by its path, idrm/ itself is first on sys.path: put the folder that holds the package there instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from idrm.command_line import length_within, named_sets
from idrm.errors import InputError
from idrm.nli.arguments import TeacherConfiguration, TeacherTrainingArguments, parse_arguments
from idrm.nli.classifier import (
    classifier_labels,
    load_classifier,
    load_classifier_config,
    load_classifier_tokenizer,
    longest_input,
    reads_token_types,
)
from idrm.nli.encoding import encode_nli
from idrm.nli.evaluation import evaluate_classifier, metric_names
from idrm.nli.held_out import hold_out
from idrm.nli.loading import load_all_nli, load_nli, reorder_labels
from idrm.nli.trainer import NliTrainer
from idrm.processes import command, prepare_training
from idrm.run_folder import resume_checkpoint, write_run_file, write_whole

logger = logging.getLogger("idrm.teacher")

# SNLI's longest pair has 113 WordPiece tokens (dev and test), and 256 is what DeBERTa was published with on MultiNLI.
DEFAULT_MAX_LENGTH = 256
CHECK_FOLDER = "idrm-teacher-check"
ACCURACY_FILE = "nli_accuracy.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        config = parse_arguments(argv)
        if config.examination.check:
            check(config)
        else:
            train(config)


def train(config: TeacherConfiguration) -> None:
    """One training run: checks and loads everything, trains, saves the best model, evaluates it.

    Raises:
        InputError: anything the user can put right; nothing has been written to the output folder then.
    """
    checkpoint = resume_checkpoint(config)
    name = config.encoder.model_name_or_path
    encoder_config = load_classifier_config(name)
    tokenizer = load_classifier_tokenizer(name)
    args = prepare_training(config, "idrm/teacher.py")
    if encoder_config.model_type == "deberta" and (args.bf16 or args.fp16):
        raise InputError("--bf16, --fp16: transformers' DeBERTa v1 fails under autocast; leave it in float32")
    length = _max_length(config, encoder_config)

    with args.main_process_first(desc="reading the data"):
        pairs, labels = _training_pairs(config, encoder_config)
        sets = _evaluation_pairs(config, args, pairs, labels)
        encoded = {
            which: _encoded(config, which, part, tokenizer, encoder_config, length, args.length_column_name)
            for which, part in sets.items()
        }
    train_set = encoded.pop("train")
    # Batches of equal lengths hold little padding, and the longest come first, in case they are too much.
    encoded = {which: part.sort(args.length_column_name, reverse=True) for which, part in encoded.items()}
    _require_known_metric(args.metric_for_best_model, labels)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_set) < batch:
        raise InputError(f"--dataloader_drop_last: {len(train_set)} pairs make no batch of {batch}, and no step")

    trainer = NliTrainer(
        load_classifier(
            name,
            encoder_config,
            labels,
            pooling=config.encoder.pooling,
            attn_implementation=config.encoder.attn_implementation,
        ),
        args,
        train_set,
        encoded["eval"],
        processing_class=tokenizer,
        labels=labels,
        early_stopping_patience=args.early_stopping_patience,
    )
    if trainer.is_world_process_zero():
        write_run_file(config)
    outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.state
    if state.global_step < state.max_steps:
        logger.info("Stopped early, at step %d of %d.", state.global_step, state.max_steps)
    if args.load_best_model_at_end and state.best_model_checkpoint:
        best = Path(state.best_model_checkpoint).name
        logger.info("The best checkpoint is %s: %s %.4f.", best, args.metric_for_best_model, state.best_metric)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    trainer.report("train", {**outcome.metrics, "train_pairs": len(train_set)})
    for which, part in encoded.items():
        trainer.report(which, trainer.evaluate(part, metric_key_prefix=which))
    logger.info("The teacher is in %s", config.output_dir)
    trainer.accelerator.end_training()


def check(config: TeacherConfiguration) -> None:
    """Examines the encoder at --model_name_or_path: its accuracy on NLI, as a table and in ACCURACY_FILE.

    A checkpoint that is no NLI classifier has no accuracy, which the log says.

    Raises:
        InputError: anything the user can put right.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--check runs in one process: start it with python or idrm teacher")
    folder = config.output_dir if "output_dir" in config.given else Path(CHECK_FOLDER)
    accuracy = _accuracy(config)
    if accuracy is not None:
        _print_accuracy(config, accuracy)
        write_whole(folder / ACCURACY_FILE, json.dumps(accuracy, indent=2) + "\n")
        logger.info("The report is in %s", folder)


def _training_pairs(config: TeacherConfiguration, encoder_config: PreTrainedConfig) -> tuple[Dataset, tuple[str, ...]]:
    """The training pairs, and the labels in the order that the model has them: its own where it has a head for them."""
    data = config.data
    pairs, labels, reports = load_all_nli(data.dataset_name, split=data.dataset_split, label_names=config.label_names)
    for report in reports:
        logger.info(report.summary())
    known = classifier_labels(encoder_config)
    if known is not None and known != labels and set(known) == set(labels):
        logger.info("Labels are in the order of the checkpoint's head: %s.", ", ".join(known))
        return reorder_labels(pairs, labels, known), known
    return pairs, labels


def _evaluation_pairs(
    config: TeacherConfiguration, args: TeacherTrainingArguments, pairs: Dataset, labels: tuple[str, ...]
) -> dict[str, Dataset]:
    """All sets by the name that their metrics bear: train, eval, and test or test_<name>."""
    data = config.data
    if data.eval_dataset_name is None:
        training, evaluation = hold_out(pairs, data.eval_share, args.seed)
        logger.info(
            "Without --eval_dataset_name, %s of the training pairs are held out to evaluate on (--eval_share %g of the "
            "premises), and %s are trained on.",
            f"{len(evaluation):,}",
            data.eval_share,
            f"{len(training):,}",
        )
    else:
        training, evaluation = pairs, _labelled(config, data.eval_dataset_name, data.eval_dataset_split, labels)
    tests = {
        f"test_{name}" if name else "test": _labelled(config, source, data.test_dataset_split, labels)
        for name, source in named_sets("test_dataset_name", data.test_dataset_name).items()
    }
    return {"train": training, "eval": evaluation, **tests}


def _labelled(config: TeacherConfiguration, source: str, split: str, labels: tuple[str, ...]) -> Dataset:
    pairs, _, report = load_nli(source, split=split, label_names=config.label_names, labels=labels)
    logger.info(report.summary())
    return pairs


def _encoded(
    config: TeacherConfiguration,
    which: str,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encoder_config: PreTrainedConfig,
    length: int,
    length_column: str,
) -> Dataset:
    encoded, cut = encode_nli(
        pairs,
        tokenizer,
        max_length=length,
        token_types=reads_token_types(encoder_config, tokenizer),
        length_column=length_column,
        num_proc=config.data.dataset_num_proc,
    )
    if cut:
        logger.info("%s: %s of %s pairs have more than %d tokens and are cut.", which, cut, len(encoded), length)
    return encoded


def _max_length(config: TeacherConfiguration, encoder_config: PreTrainedConfig) -> int:
    return length_within("max_length", config.data.max_length, longest_input(encoder_config), DEFAULT_MAX_LENGTH)


def _require_known_metric(metric: str | None, labels: Sequence[str]) -> None:
    """Refuses a --metric_for_best_model that evaluation would not find after the first epoch."""
    known = ["loss", *metric_names(labels)]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise InputError(f"--metric_for_best_model {metric}: expected one of {', '.join(known)}")


def _accuracy(config: TeacherConfiguration) -> dict[str, Any] | None:
    """What `evaluate_classifier` says on --eval_dataset_name, None where there is nothing to measure."""
    name, data = config.encoder.model_name_or_path, config.data
    encoder_config = load_classifier_config(name)
    labels = classifier_labels(encoder_config)
    if labels is None:
        logger.warning("%s is no NLI classifier: there is no accuracy to measure.", name)
        return None
    if data.eval_dataset_name is None:
        logger.info("Without --eval_dataset_name, accuracy is not measured.")
        return None
    tokenizer = load_classifier_tokenizer(name)
    pairs = _labelled(config, data.eval_dataset_name, data.eval_dataset_split, labels)
    length = _max_length(config, encoder_config)
    encoded = _encoded(config, "eval", pairs, tokenizer, encoder_config, length, "length")
    model = load_classifier(
        name,
        encoder_config,
        labels,
        pooling=config.encoder.pooling,
        attn_implementation=config.encoder.attn_implementation,
    )
    if torch.accelerator.is_available() and not config.training["use_cpu"]:
        model.to(torch.accelerator.current_accelerator())
    return evaluate_classifier(
        model,
        tokenizer,
        encoded,
        labels,
        batch_size=config.training["per_device_eval_batch_size"],
        show_progress=not config.training["disable_tqdm"],
    )


def _print_accuracy(config: TeacherConfiguration, accuracy: dict[str, Any]) -> None:
    table = Table(title=f"{config.encoder.model_name_or_path} on {config.data.eval_dataset_name}")
    for column in ("label", "pairs", "accuracy"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for label, part in accuracy["per_label"].items():
        table.add_row(label, f"{part['examples']:,}", f"{part['accuracy']:.4f}")
    table.add_section()
    table.add_row("all", f"{accuracy['examples']:,}", f"{accuracy['accuracy']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
