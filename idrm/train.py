"""Trains a reward model with interaction distillation: the entry point, one run from flags to saved model.

    deepspeed idrm/train.py --deepspeed ds_zero3.json [flags]
    python idrm/train.py [flags]
    idrm train [flags]

With neither a model nor data named, the embedded demonstration runs (idrm/embedded).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    # Started by its path, idrm/ itself is first on sys.path: put the folder that holds the package there instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from idrm.alignment import PairEncoder, encode_preferences, exchange_teacher_texts
from idrm.arguments import (
    RewardTrainingArguments,
    RunConfiguration,
    margins_of_labels,
    named_evaluation_sets,
    paired_layers,
    parse_arguments,
)
from idrm.capture import Teacher, resolve_layers
from idrm.capture.teacher import DEFAULT_TEACHER_MAX_LENGTH
from idrm.capture.uniform import UniformTeacher
from idrm.collator import PairCollator
from idrm.command_line import length_within, refused_arguments
from idrm.errors import InputError
from idrm.interaction import InteractionLoss, require_runnable_kernel
from idrm.metrics import BOTTLENECK_METRICS, INTERACTION_METRICS, PREFERENCE_METRICS
from idrm.models import load_student, load_student_config, load_student_tokenizer, longest_input, torch_dtype
from idrm.objectives import PreferenceLoss, attach_bottleneck, draw_pair_order, flip_labels
from idrm.preference import PairColumns, load_preferences
from idrm.processes import command, prepare_training, require_trainable_setup
from idrm.run_folder import resume_checkpoint, write_run_file
from idrm.shared_prompts import TokenBatches, packed_attention_refusal, packed_length, read_packed_pairs
from idrm.teacher_cache import CachedTeacher, ReleaseTeacher, TeacherCache, prepare_cache_folder
from idrm.trainer import RewardTrainer

logger = logging.getLogger("idrm.train")

DEFAULT_MAX_LENGTH = 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        config = parse_arguments(argv)
        if config.is_embedded:
            from idrm.embedded import demonstration

            demonstration.run(config)
        else:
            train(config)


def train(config: RunConfiguration) -> None:
    """One training run: checks and loads everything, trains, saves the model, evaluates.

    Raises:
        InputError: anything the user can put right; nothing has been written to the output folder then.
    """
    checkpoint = resume_checkpoint(config)
    student_config = load_student_config(config.model)
    tokenizer = load_student_tokenizer(config.model)
    args = prepare_training(config, "idrm/train.py")
    if config.model.teacher_cache is not None:
        prepare_cache_folder(Path(config.model.teacher_cache).expanduser())
    teacher = _load_teacher(config, args) if config.interaction.alpha > 0 else None
    student_layers: tuple[int, ...] = ()
    if teacher is not None:
        student_layers, _ = paired_layers(config.interaction)
        student_layers = resolve_layers(student_layers, student_config.get_text_config().num_hidden_layers, "student")
        _require_whole_head_groups(config, student_config.get_text_config().num_attention_heads, teacher.num_heads)
        require_runnable_kernel(config.interaction, args.device)
    eval_sources = named_evaluation_sets(config.data.eval_dataset_name)
    objective = config.objective
    metrics = [
        *PREFERENCE_METRICS,
        *(INTERACTION_METRICS if teacher is not None else ()),
        *(BOTTLENECK_METRICS if objective.inform_latent_size else ()),
    ]
    _require_known_metric(args.metric_for_best_model, eval_sources, metrics)

    encoder = _pair_encoder(config, args, tokenizer, teacher, longest_input(student_config))
    share_prompt = _shares_prompts(config, student_config, encoder.max_length)
    train_set = _encoded_pairs(config, args, encoder, config.data.dataset_name, trains=True)
    token_batches = _token_batches(config, args, train_set)
    eval_sets = {name: _encoded_pairs(config, args, encoder, source) for name, source in eval_sources.items()}
    cache = _open_cache(config, teacher, [train_set, *eval_sets.values()])
    interaction = None
    if cache is not None:
        cached_teacher = CachedTeacher(teacher, cache)
        interaction = InteractionLoss(cached_teacher, student_layers, config.interaction)
    elif config.data.teacher_control == "uniform":
        interaction = InteractionLoss(UniformTeacher(teacher), student_layers, config.interaction)
    elif teacher is not None:
        interaction = InteractionLoss(teacher.to(args.device), student_layers, config.interaction)

    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_set) < batch:
        raise InputError(f"--dataloader_drop_last: {len(train_set)} pairs make no batch of {batch}, and no step")

    student = load_student(config.model, student_config, tokenizer)
    if objective.inform_latent_size:
        attach_bottleneck(student, objective.inform_latent_size, objective.inform_kl)
    share_prompt = share_prompt and _let_share(config, student)
    with refused_arguments():
        trainer = RewardTrainer(
            student,
            args,
            PairCollator(
                tokenizer, teacher and teacher.tokenizer, config.interaction.interaction_rows, cache, share_prompt
            ),
            train_set,
            eval_sets.get("", eval_sets) or None,
            processing_class=tokenizer,
            interaction=interaction,
            alpha=config.interaction.alpha,
            preference_loss=PreferenceLoss(
                label_smoothing=objective.preference_label_smoothing,
                confidence_weight=objective.confidence_weight,
                confidence_warmup=objective.confidence_warmup,
            ),
            bottleneck_weight=objective.inform_beta,
            token_batches=token_batches,
        )
        require_trainable_setup(trainer)
    if cache is not None:
        trainer.add_callback(ReleaseTeacher(cached_teacher))
    if trainer.is_world_process_zero():
        write_run_file(config)
    outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    trainer.report("train", {**outcome.metrics, "train_pairs": len(train_set)})
    for name, pairs in eval_sets.items():
        split = f"eval_{name}" if name else "eval"
        trainer.report(split, trainer.evaluate(pairs, metric_key_prefix=split))
    if cache is not None:
        logger.info(
            "Teacher cache: of the pairs that this process read, %s came from it and %s from the teacher.",
            f"{cached_teacher.found:,}",
            f"{cached_teacher.computed:,}",
        )
    logger.info("The reward model is in %s", config.output_dir)
    trainer.accelerator.end_training()


def _load_teacher(config: RunConfiguration, args: RewardTrainingArguments) -> Teacher:
    # Under 5.17 as under 5.23, the deprecated names mirror the new ones.
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise InputError(
            "activation checkpointing with use_reentrant true gives captured queries and keys no gradient: leave "
            "use_reentrant out, or set it to false"
        )
    return Teacher.load(
        config.model.teacher_name_or_path,
        layers=paired_layers(config.interaction)[1],
        attn_implementation=config.model.teacher_attn_implementation,
        dtype=torch_dtype(config.model.teacher_dtype),
    )


def _shares_prompts(config: RunConfiguration, student: PreTrainedConfig, longest: int) -> bool:
    """Whether prompts are read once; says why not, where they are not and might have been."""
    asked = config.data.share_prompt
    if asked == "off":
        return False
    refusal = packed_attention_refusal(student, config.model.attn_implementation, longest)
    if config.training["torch_compile"]:
        refusal = "under --torch_compile every batch would be compiled anew"
    return refusal is None or _not_shared(config, refusal)


def _let_share(config: RunConfiguration, student: PreTrainedModel) -> bool:
    """Whether the student, now that it is loaded, can be called with packed pairs; from here on it can."""
    try:
        read_packed_pairs(student)
    except InputError as error:
        return _not_shared(config, str(error))
    return True


def _not_shared(config: RunConfiguration, reason: str) -> Literal[False]:
    """Says why prompts are read twice; InputError where sharing was asked for."""
    if config.data.share_prompt == "on":
        raise InputError(f"--share_prompt on: {reason}")
    if config.data.tokens_per_batch is not None:
        raise InputError(f"--tokens_per_batch {config.data.tokens_per_batch}: needs each prompt read once: {reason}")
    logger.info("A pair's prompt is read in both of its sequences: %s.", reason)
    return False


def _token_batches(config: RunConfiguration, args: RewardTrainingArguments, pairs: Dataset) -> TokenBatches | None:
    """The micro-batches of --tokens_per_batch, described in the log; None where it is not given."""
    if config.data.tokens_per_batch is None:
        return None
    sequences = zip(pairs["chosen_input_ids"], pairs["rejected_input_ids"], strict=True)
    tokens = [packed_length(chosen, rejected) for chosen, rejected in sequences]
    batches = TokenBatches.form(tokens, config.data.tokens_per_batch, _data_seed(args))
    logger.info(batches.summary())
    return batches


def _data_seed(args: RewardTrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _open_cache(config: RunConfiguration, teacher: Teacher | None, data_sets: Sequence[Dataset]) -> TeacherCache | None:
    if teacher is None or config.model.teacher_cache is None:
        return None
    return TeacherCache.open(
        config.model.teacher_cache,
        teacher,
        data_sets,
        normalization=config.interaction.normalization,
        num_head_groups=config.interaction.num_head_groups,
        max_gigabytes=config.model.teacher_cache_max_gb,
    )


def _require_whole_head_groups(config: RunConfiguration, student_heads: int, teacher_heads: int) -> None:
    groups = config.interaction.num_head_groups
    if student_heads % groups or teacher_heads % groups:
        raise InputError(
            f"--num_head_groups {groups}: must divide the heads of both models, {student_heads} of the student and "
            f"{teacher_heads} of the teacher"
        )


def _require_known_metric(metric: str | None, eval_sources: Iterable[str], names: Sequence[str]) -> None:
    """Refuses a --metric_for_best_model that evaluation would not find after the first hours."""
    prefixes = [f"eval_{name}_" if name else "eval_" for name in eval_sources]
    known = [prefix + name for prefix in prefixes for name in names]
    if metric is not None and metric not in known and f"eval_{metric}" not in known:
        raise InputError(
            f"--metric_for_best_model {metric}: expected one of {', '.join(known) or 'none, without evaluation'}"
        )


def _pair_encoder(
    config: RunConfiguration,
    args: RewardTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher | None,
    student_limit: int | None,
) -> PairEncoder:
    max_length = length_within("max_length", config.data.max_length, student_limit, DEFAULT_MAX_LENGTH)
    if teacher is None:
        return PairEncoder(tokenizer, None, max_length=max_length, teacher_max_length=DEFAULT_TEACHER_MAX_LENGTH)
    if config.data.teacher_long_inputs == "windows" and not teacher.reads_windows:
        raise InputError(
            "--teacher_long_inputs windows: this teacher turns queries and keys by their position in a window, so that "
            f"those of two windows do not compare; it reads up to {teacher.max_length} tokens at once, beyond which cut"
        )
    default = teacher.max_length or DEFAULT_TEACHER_MAX_LENGTH
    teacher_max_length = length_within(
        "teacher_max_length", config.data.teacher_max_length, teacher.max_length, default
    )
    return PairEncoder(
        tokenizer,
        teacher.tokenizer,
        max_length=max_length,
        teacher_max_length=teacher_max_length,
        teacher_segment_order=config.data.teacher_segment_order,
        teacher_long_inputs=config.data.teacher_long_inputs,
        seed=_data_seed(args),
    )


def _encoded_pairs(
    config: RunConfiguration, args: RewardTrainingArguments, encoder: PairEncoder, source: str, *, trains: bool = False
) -> Dataset:
    """Loads and encodes one data set, each machine's first process before its others, which find it cached."""
    objective = config.objective
    flips = trains and objective.flip_fraction > 0
    columns = PairColumns(
        margin=objective.margin_column,
        margin_labels=margins_of_labels(objective.margin_labels),
        strength=objective.flip_column if flips else None,
    )
    with args.main_process_first(desc=f"reading {source}"):
        split = config.data.dataset_split if trains else config.data.eval_dataset_split
        pairs, report = load_preferences(source, split=split, columns=columns)
        logger.info(report.summary())
        # Not by what was given: a run.yaml names every column, that of a run without margins too.
        wants_margins = trains and (objective.margin_column != PairColumns.margin or objective.margin_labels)
        if wants_margins and all(margin is None for margin in pairs["margin"][:]):
            raise InputError(f"--margin_column {objective.margin_column}: no pair of {source} has a value in it")
        if flips:
            pairs, flipped = flip_labels(pairs, objective.flip_fraction)
            logger.info(flipped.summary())
        pairs, alignment = encode_preferences(pairs, encoder, num_proc=config.data.dataset_num_proc)
        logger.info(alignment.summary())
        if config.data.teacher_control == "other_pair":
            pairs = exchange_teacher_texts(pairs)
    if trains and objective.confidence_weight > 0:
        pairs = draw_pair_order(pairs, _data_seed(args))
    # What --train_sampling_strategy group_by_length groups by.
    sequences = zip(pairs["chosen_input_ids"], pairs["rejected_input_ids"], strict=True)
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in sequences]
    return pairs.add_column(args.length_column_name, lengths)


if __name__ == "__main__":
    main()
