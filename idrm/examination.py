"""The examination of teachers, `idrm teacher --check`: accuracy on NLI, and what their attention maps look like."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idrm.errors import InputError
from idrm.inspection import inspect_teacher
from idrm.nli.arguments import TeacherConfiguration
from idrm.nli.classifier import classifier_labels, load_classifier, load_classifier_config, load_classifier_tokenizer
from idrm.nli.evaluation import evaluate_classifier
from idrm.nli.sets import encoded_pairs, labelled_pairs
from idrm.preference import WITHOUT_MARGINS, load_preferences
from idrm.run_folder import require_writable, write_whole

logger = logging.getLogger("idrm.teacher")

DEFAULT_FOLDER = "idrm-teacher-check"
ACCURACY_FILE = "nli_accuracy.json"
SEED_OF_OTHER_PREMISES = 0


def examine(config: TeacherConfiguration) -> None:
    """Examines the encoder at --model_name_or_path, and those of --compare_with beside it.

    With --eval_dataset_name, accuracy on NLI as a table; with --pairs_name, the attention maps as a table, and both in
    check.json, check.md and check.png (``inspect_teacher``); without --pairs_name, accuracy in ACCURACY_FILE. A
    checkpoint that is no NLI classifier has no accuracy.

    Raises:
        InputError: anything the user can put right; nothing has been written then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--check runs in one process: start it with python or idrm teacher")
    arguments = config.examination
    folder = config.output_dir if "output_dir" in config.given else Path(DEFAULT_FOLDER)
    require_writable("--output_dir", folder)
    device = _device(config)
    names = [config.encoder.model_name_or_path, *(arguments.compare_with or [])]
    measures = {name: functools.cache(functools.partial(_accuracy, config, name, device)) for name in names}
    if arguments.pairs_name is None:
        found = {name: accuracy for name, measure in measures.items() if (accuracy := measure()) is not None}
        if not found:
            raise InputError(
                f"{names[0]}: is no NLI classifier, and there is nothing to measure without its head; give "
                "--pairs_name for its attention maps"
            )
        _print_accuracies(config, found)
        write_whole(folder / ACCURACY_FILE, json.dumps(found, indent=2) + "\n")
    else:
        pairs, report = load_preferences(arguments.pairs_name, split=arguments.pairs_split, columns=WITHOUT_MARGINS)
        logger.info(report.summary())
        inspect_teacher(
            names[0],
            pairs,
            output_dir=folder,
            accuracy=measures[names[0]],
            compare_with={name: measures[name] for name in names[1:]},
            max_pairs=arguments.max_pairs,
            teacher_max_length=arguments.teacher_max_length,
            interaction_rows=arguments.interaction_rows,
            heat_map_pair=arguments.heat_map_pair,
            heat_map_layer=arguments.heat_map_layer,
            heat_map_normalization=arguments.heat_map_normalization,
            device=device,
        )
        found = {name: accuracy for name, measure in measures.items() if (accuracy := measure()) is not None}
        if found:
            _print_accuracies(config, found)
    logger.info("The report is in %s", folder)


def _device(config: TeacherConfiguration) -> torch.device:
    if torch.accelerator.is_available() and not config.training["use_cpu"]:
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def _accuracy(config: TeacherConfiguration, name: str, device: torch.device) -> dict[str, Any] | None:
    """What `evaluate_classifier` says on --eval_dataset_name, None where there is nothing to measure.

    "with_other_premises" is the accuracy where the premises of the set are exchanged among its pairs: what is left of
    the other is what the true premises add.
    """
    if config.data.eval_dataset_name is None:
        return None
    whose = None if name == config.encoder.model_name_or_path else f"--compare_with {name}"
    encoder_config = load_classifier_config(name, whose=whose)
    labels = classifier_labels(encoder_config)
    if labels is None:
        logger.warning("%s is no NLI classifier: there is no accuracy to measure.", name)
        return None
    tokenizer = load_classifier_tokenizer(name, whose=whose)
    pairs = labelled_pairs(config, config.data.eval_dataset_name, config.data.eval_dataset_split, labels)
    model = load_classifier(
        name,
        encoder_config,
        labels,
        pooling=config.encoder.pooling,
        attn_implementation=config.encoder.attn_implementation,
        new_head=False,
        whose=whose,
    ).to(device)

    def evaluate(pairs: Dataset) -> dict[str, Any]:
        return evaluate_classifier(
            model,
            tokenizer,
            encoded_pairs(config, "eval", pairs, tokenizer, encoder_config, "length"),
            labels,
            batch_size=config.training["per_device_eval_batch_size"],
            show_progress=not config.training["disable_tqdm"],
        )

    order = np.random.default_rng(SEED_OF_OTHER_PREMISES).permutation(len(pairs))
    premises = pairs["premise"][:]
    exchanged = pairs.remove_columns("premise").add_column("premise", [premises[row] for row in order])
    return {**evaluate(pairs), "with_other_premises": evaluate(exchanged)["accuracy"]}


def _print_accuracies(config: TeacherConfiguration, accuracies: dict[str, dict[str, Any]]) -> None:
    table = Table(title=escape(f"Accuracy on {config.data.eval_dataset_name}"))
    for column in ("teacher", "label", "pairs", "accuracy"):
        table.add_column(column, justify="left" if column in ("teacher", "label") else "right")
    for name, accuracy in accuracies.items():
        parts = {**accuracy["per_label"], "all": accuracy}
        parts["all, with other pairs' premises"] = {**accuracy, "accuracy": accuracy["with_other_premises"]}
        for label, part in parts.items():
            table.add_row(escape(name), escape(label), f"{part['examples']:,}", f"{part['accuracy']:.4f}")
        table.add_section()
    Console().print(table)
