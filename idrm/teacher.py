"""Fine-tunes an encoder on NLI, which makes it a teacher, or examines one: the entry point, from flags to saved model.

idrm teacher [flags]
python idrm/teacher.py [flags]
deepspeed idrm/teacher.py --deepspeed ds_zero3.json [flags]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Started by its path, idrm/ itself is first on sys.path: put the folder that holds the package there instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import EarlyStoppingCallback

from idrm.command_line import refused_arguments
from idrm.errors import InputError
from idrm.nli.arguments import TeacherConfiguration, parse_arguments
from idrm.nli.classifier import load_classifier, load_classifier_config, load_classifier_tokenizer
from idrm.nli.evaluation import metric_names
from idrm.nli.sets import encoded_pairs, evaluation_pairs, input_length, training_pairs
from idrm.nli.trainer import NliTrainer
from idrm.processes import command, prepare_training, require_trainable_setup
from idrm.run_folder import resume_checkpoint, write_run_file

logger = logging.getLogger("idrm.teacher")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        config = parse_arguments(argv)
        if config.examination.check:
            from idrm.examination import examine

            examine(config)
        else:
            train(config)


def train(config: TeacherConfiguration) -> None:
    """One training run: checks and loads everything, trains, saves the best model, evaluates it.

    Raises:
        InputError: anything the user can put right; nothing has been written to the output folder then, unless the
            training has diverged.
    """
    checkpoint = resume_checkpoint(config)
    name = config.encoder.model_name_or_path
    encoder_config = load_classifier_config(name)
    tokenizer = load_classifier_tokenizer(name)
    args = prepare_training(config, "idrm/teacher.py")
    if encoder_config.model_type == "deberta" and (args.bf16 or args.fp16):
        raise InputError("--bf16, --fp16: transformers' DeBERTa v1 fails under autocast; leave it in float32")
    input_length(config, encoder_config)  # refused before the data are read

    with args.main_process_first(desc="reading the data"):
        pairs, labels = training_pairs(config, encoder_config)
        sets = evaluation_pairs(config, args, pairs, labels)
        encoded = {
            which: encoded_pairs(config, which, part, tokenizer, encoder_config, args.length_column_name)
            for which, part in sets.items()
        }
    train_set = encoded.pop("train")
    # Batches of equal lengths hold little padding, and the longest come first, in case they are too much.
    encoded = {which: part.sort(args.length_column_name, reverse=True) for which, part in encoded.items()}
    present = set(encoded["eval"]["label"][:])
    _require_known_metric(args.metric_for_best_model, [label for index, label in enumerate(labels) if index in present])
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_set) < batch:
        raise InputError(f"--dataloader_drop_last: {len(train_set)} pairs make no batch of {batch}, and no step")

    model = load_classifier(
        name,
        encoder_config,
        labels,
        pooling=config.encoder.pooling,
        attn_implementation=config.encoder.attn_implementation,
    )
    with refused_arguments():
        trainer = NliTrainer(
            model,
            args,
            train_set,
            encoded["eval"],
            processing_class=tokenizer,
            labels=labels,
            early_stopping_patience=args.early_stopping_patience,
        )
        require_trainable_setup(trainer)
    if trainer.is_world_process_zero():
        write_run_file(config)
    outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.state
    if state.global_step < state.max_steps:
        logger.info("Stopped early, at step %d of %d.", state.global_step, state.max_steps)
    if args.load_best_model_at_end and state.best_model_checkpoint:
        best = Path(state.best_model_checkpoint).name
        logger.info("The best checkpoint is %s: %s %.4f.", best, args.metric_for_best_model, state.best_metric)
    trainer.save_state()
    trainer.remove_callback(EarlyStoppingCallback)  # it would miss its metric among those of the tests
    # A model that has diverged is refused here, and not saved.
    evaluations = {which: trainer.evaluate(part, metric_key_prefix=which) for which, part in encoded.items()}
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.report("train", {**outcome.metrics, "train_pairs": len(train_set)})
    for which, metrics in evaluations.items():
        trainer.report(which, metrics)
    logger.info("The teacher is in %s", config.output_dir)
    trainer.accelerator.end_training()


def _require_known_metric(metric: str | None, labels: Sequence[str]) -> None:
    """Refuses a --metric_for_best_model that evaluation on pairs of these labels would not find after an epoch."""
    known = ["loss", *metric_names(labels)]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise InputError(f"--metric_for_best_model {metric}: expected one of {', '.join(known)}")


if __name__ == "__main__":
    main()
