"""The NLI sets of a run: loaded, labelled in one order, held out where none is given, and tokenised."""

from __future__ import annotations

import logging

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from idrm.command_line import length_within, named_sets
from idrm.nli.arguments import TeacherConfiguration, TeacherTrainingArguments
from idrm.nli.classifier import classifier_labels, longest_input, reads_token_types
from idrm.nli.encoding import encode_nli
from idrm.nli.held_out import hold_out
from idrm.nli.loading import load_all_nli, load_nli, reorder_labels

logger = logging.getLogger("idrm.teacher")

# SNLI's longest pair has 113 WordPiece tokens (dev and test), and 256 is what DeBERTa was published with on MultiNLI.
DEFAULT_MAX_LENGTH = 256


def training_pairs(config: TeacherConfiguration, encoder_config: PreTrainedConfig) -> tuple[Dataset, tuple[str, ...]]:
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


def evaluation_pairs(
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
        training, evaluation = pairs, labelled_pairs(config, data.eval_dataset_name, data.eval_dataset_split, labels)
    tests = {
        f"test_{name}" if name else "test": labelled_pairs(config, source, data.test_dataset_split, labels)
        for name, source in named_sets("test_dataset_name", data.test_dataset_name).items()
    }
    return {"train": training, "eval": evaluation, **tests}


def labelled_pairs(config: TeacherConfiguration, source: str, split: str, labels: tuple[str, ...]) -> Dataset:
    """The pairs of one source, with labels in this order."""
    pairs, _, report = load_nli(source, split=split, label_names=config.label_names, labels=labels)
    logger.info(report.summary())
    return pairs


def encoded_pairs(
    config: TeacherConfiguration,
    which: str,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encoder_config: PreTrainedConfig,
    length_column: str,
) -> Dataset:
    """A set, tokenised to the length that the encoder and the user allow; what is cut is said under its name."""
    length = input_length(config, encoder_config)
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


def input_length(config: TeacherConfiguration, encoder_config: PreTrainedConfig) -> int:
    """The longest input in tokens. Raises InputError for a --max_length beyond what the encoder reads."""
    return length_within("max_length", config.data.max_length, longest_input(encoder_config), DEFAULT_MAX_LENGTH)
