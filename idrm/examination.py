"""The examination of teachers, `idrm teacher --check`: accuracy on NLI, and what their attention maps look like."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from idrm.errors import InputError
from idrm.inspection import inspect_teacher
from idrm.nli.arguments import TeacherConfiguration
from idrm.nli.classifier import classifier_labels, load_classifier, load_classifier_config, load_classifier_tokenizer
from idrm.nli.evaluation import evaluate_classifier
from idrm.nli.sets import encoded_pairs, labelled_pairs
from idrm.preference import load_preferences
from idrm.run_folder import write_whole

logger = logging.getLogger("idrm.teacher")

DEFAULT_FOLDER = "idrm-teacher-check"
ACCURACY_FILE = "nli_accuracy.json"


def examine(config: TeacherConfiguration) -> None:
    """Examines the encoder at --model_name_or_path, and those of --compare_with beside it.

    With --eval_dataset_name, accuracy on NLI as a table and in ACCURACY_FILE; with --pairs_name, the attention maps as
    a table, and check.json, check.md and check.png (``inspect_teacher``). A checkpoint that is no NLI classifier has no
    accuracy, which the log says.

    Raises:
        InputError: anything the user can put right.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--check runs in one process: start it with python or idrm teacher")
    arguments = config.examination
    folder = config.output_dir if "output_dir" in config.given else Path(DEFAULT_FOLDER)
    name, others = config.encoder.model_name_or_path, arguments.compare_with or []
    pairs = None
    if arguments.pairs_name is not None:
        pairs, report = load_preferences(arguments.pairs_name, split=arguments.pairs_split)
        logger.info(report.summary())
    device = _device(config)
    accuracies = {teacher: _accuracy(config, teacher, device) for teacher in (name, *others)}
    measured = {teacher: accuracy for teacher, accuracy in accuracies.items() if accuracy is not None}
    if measured:
        _print_accuracies(config, measured)
        write_whole(folder / ACCURACY_FILE, json.dumps(measured, indent=2) + "\n")
    if pairs is not None:
        inspect_teacher(
            name,
            pairs,
            output_dir=folder,
            accuracy=accuracies.pop(name),
            compare_with=accuracies,
            max_pairs=arguments.max_pairs,
            teacher_max_length=arguments.teacher_max_length,
            interaction_rows=arguments.interaction_rows,
            heat_map_pair=arguments.heat_map_pair,
            heat_map_layer=arguments.heat_map_layer,
            heat_map_normalization=arguments.heat_map_normalization,
            device=device,
        )
    if measured or pairs is not None:
        logger.info("The report is in %s", folder)


def _device(config: TeacherConfiguration) -> torch.device:
    if torch.accelerator.is_available() and not config.training["use_cpu"]:
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def _accuracy(config: TeacherConfiguration, name: str, device: torch.device) -> dict[str, Any] | None:
    """What `evaluate_classifier` says on --eval_dataset_name, None where there is nothing to measure."""
    encoder_config = load_classifier_config(name)
    labels = classifier_labels(encoder_config)
    if config.data.eval_dataset_name is None:
        logger.info("Without --eval_dataset_name, accuracy is not measured.")
        return None
    if labels is None:
        logger.warning("%s is no NLI classifier: there is no accuracy to measure.", name)
        return None
    tokenizer = load_classifier_tokenizer(name)
    pairs = labelled_pairs(config, config.data.eval_dataset_name, config.data.eval_dataset_split, labels)
    encoded = encoded_pairs(config, "eval", pairs, tokenizer, encoder_config, "length")
    model = load_classifier(
        name,
        encoder_config,
        labels,
        pooling=config.encoder.pooling,
        attn_implementation=config.encoder.attn_implementation,
    )
    return evaluate_classifier(
        model.to(device),
        tokenizer,
        encoded,
        labels,
        batch_size=config.training["per_device_eval_batch_size"],
        show_progress=not config.training["disable_tqdm"],
    )


def _print_accuracies(config: TeacherConfiguration, accuracies: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"Accuracy on {config.data.eval_dataset_name}")
    for column in ("teacher", "label", "pairs", "accuracy"):
        table.add_column(column, justify="left" if column in ("teacher", "label") else "right")
    for name, accuracy in accuracies.items():
        for label, part in accuracy["per_label"].items():
            table.add_row(name, label, f"{part['examples']:,}", f"{part['accuracy']:.4f}")
        table.add_row(name, "all", f"{accuracy['examples']:,}", f"{accuracy['accuracy']:.4f}", end_section=True)
    Console().print(table)
