"""What a teacher's run is told: every flag of `idrm teacher` with its default and meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from idrm.command_line import (
    FlagParser,
    TrainingRun,
    fields_of,
    named_sets,
    recorded_values,
    require_at_least,
    require_defaults,
    require_saving_deepspeed,
    require_trainable,
)
from idrm.errors import InputError
from idrm.inspection.findings import DEFAULT_MAX_PAIRS, MOST_TEACHERS
from idrm.nli.loading import require_nli_labels

# transformers' arguments that would leave evaluation without its metrics.
_INAPPLICABLE = ("prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches")
# What would do nothing in an examination.
_OF_TRAINING = (
    *("dataset_name", "dataset_split", "eval_share", "test_dataset_name", "test_dataset_split"),
    *("early_stopping_patience", "deepspeed", "resume_from_checkpoint"),
)


@dataclass
class EncoderArguments:
    """The encoder that becomes a teacher."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Encoder to fine-tune: folder or hub name of a BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa (v1 to "
            "v3) or ModernBERT checkpoint."
        },
    )
    pooling: Literal["cls", "mean"] | None = field(
        default=None,
        metadata={
            "help": "What the classifier reads: the first token's last hidden state (cls) or the mean over all tokens "
            "(mean). Default: what the checkpoint's classifier_pooling says, else cls."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "The encoder's attention: eager, sdpa or flash_attention_2. Default: transformers' choice."},
    )


@dataclass
class NliDataArguments:
    """Premises and hypotheses."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training pairs: a hub name (stanfordnlp/snli, nyu-mll/glue:mnli), a .jsonl, .json, .jsonl.gz or "
            ".parquet file, or a folder; several are read one after another."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name to train on."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs that choose the best checkpoint. Default: --eval_share of the training pairs."},
    )
    eval_dataset_split: str = field(
        default="validation", metadata={"help": "Split of a hub name or folder in --eval_dataset_name."}
    )
    eval_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training premises, with all their hypotheses, that is held out to evaluate on where "
            "--eval_dataset_name is not given."
        },
    )
    test_dataset_name: list[str] | None = field(
        default=None,
        metadata={"help": "Pairs for one last evaluation of the saved model; several are given as name=path."},
    )
    test_dataset_split: str = field(
        default="test", metadata={"help": "Split of hub names and folders in --test_dataset_name."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest input in tokens, both sides together. Default: 256, or the encoder's own limit where that "
            "is lower."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data. Default: this one."}
    )


@dataclass
class CheckArguments:
    """The examination of a teacher."""

    check: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: measure the encoder at --model_name_or_path on --eval_dataset_name, and write what "
            "came out into --output_dir."
        },
    )
    compare_with: list[str] | None = field(
        default=None,
        metadata={"help": "With --check: further encoders to measure beside it, such as the same one untuned."},
    )
    pairs_name: str | None = field(
        default=None,
        metadata={"help": "With --check: preference pairs, as `idrm train` reads them, for the attention maps."},
    )
    pairs_split: str = field(default="test", metadata={"help": "Split of a hub name or folder in --pairs_name."})
    max_pairs: int = field(
        default=DEFAULT_MAX_PAIRS, metadata={"help": "Most pairs whose maps are measured, taken at even distances."}
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest joint input of a pair in tokens. Default: the teacher's limit, or 512."},
    )
    interaction_rows: Literal["all", "response"] = field(
        default="all",
        metadata={"help": "Rows of the maps that are looked at: all, or those of the responses, as in training."},
    )
    heat_map_pair: int = field(default=0, metadata={"help": "The pair in the picture, counted from 0."})
    heat_map_layer: int | None = field(
        default=None,
        metadata={"help": "Its block, negative ones from the end. Default: the one that most differs from row to row."},
    )
    heat_map_normalization: Literal["block", "joint"] = field(
        default="block",
        metadata={"help": "Attention shared out within each sequence (block) or over both (joint) in the picture."},
    )


@dataclass
class TeacherTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of NLI: evaluation each epoch, and the best checkpoint kept.

    A classifier has one input with labels: transformers' own use of the name label_names has no place here.
    """

    output_dir: str | None = field(
        default="idrm-teacher",
        metadata={"help": "Folder that receives the teacher, its tokenizer, checkpoints, metrics and run.yaml."},
    )
    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate. Large encoders are published with 6e-6 to 3e-5."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training pairs, at most."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pairs a device and step in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pairs a device and step in evaluation."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, not of biases and norms."})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "Learning rate schedule (transformers' SchedulerType)."}
    )
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between two records of the log; below 1 a share of all steps."}
    )
    eval_strategy: str = field(
        default="epoch",
        metadata={"help": "When to evaluate: epoch, steps (also where --eval_steps is given) or no."},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint. Default: whenever evaluation is."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Save the best checkpoint, and not the last, as the teacher."}
    )
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "What makes a checkpoint the best: a metric of the evaluation."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Go on counting the evaluations without improvement in a resumed run."}
    )
    label_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the labels, in order, where the data has bare integers. Default: what the data says, "
            "else entailment, neutral, contradiction."
        },
    )
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers to report to, such as tensorboard or wandb."}
    )
    early_stopping_patience: int = field(
        default=2,
        metadata={
            "help": "Stop after this many evaluations in a row without a better --metric_for_best_model; 0: never."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the last complete checkpoint in --output_dir (no value, or true), or from this folder.",
            "nargs": "?",
            "const": "true",
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.label_names = ["labels"]


@dataclass(frozen=True)
class TeacherConfiguration(TrainingRun[TeacherTrainingArguments]):
    """One teacher's run, or its examination, as its user described it, before anything was loaded.

    Attributes:
        encoder, data: our own arguments, checked against one another.
        examination: whether, and on what, a teacher is examined instead.
    """

    encoder: EncoderArguments
    data: NliDataArguments
    examination: CheckArguments

    training_kind = TeacherTrainingArguments
    own_arguments = (EncoderArguments, NliDataArguments)
    free_to_change = ("test_dataset_name", "test_dataset_split", "dataset_num_proc")

    @classmethod
    def own_argument_names(cls) -> list[str]:
        return [*super().own_argument_names(), "label_names", "early_stopping_patience"]

    @property
    def kept_on_resume(self) -> list[str]:
        # The seed chooses which pairs are held out: with another one, some would have been trained on before.
        return self.own_argument_names() + (["seed"] if self.data.eval_dataset_name is None else [])

    @property
    def label_names(self) -> list[str] | None:
        return self.training["label_names"]


def parse_arguments(argv: Sequence[str] | None = None) -> TeacherConfiguration:
    """Parses the command line and the YAML file that it may name; the command line wins.

    Raises:
        InputError: an unknown flag or YAML key, a value of the wrong kind, or arguments that contradict one another.
    """
    kinds = (*TeacherConfiguration.own_arguments, CheckArguments)
    parser = FlagParser((*kinds, TeacherTrainingArguments), "idrm teacher", named=("test_dataset_name",))
    values, given = parser.values(argv)
    defaults = parser.defaults()
    values |= _schedule(values, given)
    encoder, data, examination = (kind(**fields_of(kind, values)) for kind in kinds)
    _check(encoder, data, examination, values, defaults, given)
    return TeacherConfiguration(
        training=fields_of(TeacherTrainingArguments, values),
        given=given,
        recorded=recorded_values(
            values, defaults, TeacherConfiguration.own_argument_names(), fields_of(CheckArguments, values)
        ),
        encoder=encoder,
        data=data,
        examination=examination,
    )


def _schedule(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """When to evaluate and save, where what is given leaves one answer: the best checkpoint has to be there."""
    schedule = {}
    if "eval_strategy" not in given and "eval_steps" in given:
        schedule["eval_strategy"] = "steps"
    evaluation = schedule.get("eval_strategy", values["eval_strategy"])
    if "save_strategy" not in given and evaluation != "no":
        schedule["save_strategy"] = evaluation
        if evaluation == "steps" and "save_steps" not in given:
            schedule["save_steps"] = values["eval_steps"] or values["logging_steps"]
    saving = schedule.get("save_strategy", values["save_strategy"])
    if "load_best_model_at_end" not in given and "no" in (evaluation, saving):
        schedule["load_best_model_at_end"] = False
    if "early_stopping_patience" not in given and evaluation == "no":
        schedule["early_stopping_patience"] = 0
    return schedule


def _check(
    encoder: EncoderArguments,
    data: NliDataArguments,
    examination: CheckArguments,
    values: dict[str, Any],
    defaults: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """What can be told from the arguments alone."""
    if encoder.model_name_or_path is None:
        raise InputError("--model_name_or_path is missing: name the encoder, a folder or hub name")
    if values["label_names"] is not None:
        require_nli_labels("--label_names", [name.lower() for name in values["label_names"]])
    named_sets("test_dataset_name", data.test_dataset_name)
    require_at_least(
        values,
        {
            "max_length": 8,
            "teacher_max_length": 8,
            "max_pairs": 1,
            "heat_map_pair": 0,
            "dataset_num_proc": 1,
            "early_stopping_patience": 0,
        },
    )
    require_trainable(values)
    if not 0 < data.eval_share < 1:
        raise InputError(f"--eval_share: expected a share between 0 and 1, got {data.eval_share}")
    if examination.check:
        _check_examination(encoder, data, examination, given)
        return
    misplaced = sorted({entry.name for entry in fields(CheckArguments)} & given.keys() - {"check"})
    if misplaced:
        raise InputError(f"--{misplaced[0]} is for --check, which examines a teacher")
    if data.dataset_name is None:
        raise InputError(f"--model_name_or_path {encoder.model_name_or_path} needs data: give --dataset_name")
    if data.eval_dataset_name is not None and "eval_share" in given:
        raise InputError("--eval_share and --eval_dataset_name: give one of them")
    if values["early_stopping_patience"] and values["eval_strategy"] == "no":
        raise InputError("--early_stopping_patience needs evaluations: give another --eval_strategy than no")
    require_defaults(values, defaults, _INAPPLICABLE, "NLI")
    require_saving_deepspeed(values["deepspeed"])


def _check_examination(
    encoder: EncoderArguments, data: NliDataArguments, examination: CheckArguments, given: dict[str, Any]
) -> None:
    """Flags of an examination, which trains nothing."""
    if data.eval_dataset_name is None and examination.pairs_name is None:
        raise InputError("--check needs something to measure on: give --eval_dataset_name or --pairs_name")
    of_training = sorted(set(_OF_TRAINING) & given.keys())
    if of_training:
        raise InputError(f"--{of_training[0]} is for training; --check trains nothing")
    if examination.pairs_name is None:
        of_pairs = sorted({entry.name for entry in fields(CheckArguments)} & given.keys() - {"check", "compare_with"})
        if of_pairs:
            raise InputError(f"--{of_pairs[0]} is for the attention maps: give --pairs_name too")
    names = [encoder.model_name_or_path, *(examination.compare_with or [])]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise InputError(f"--compare_with {repeated}: is there already; name other encoders")
    if len(names) > MOST_TEACHERS:
        raise InputError(f"--compare_with: expected at most {MOST_TEACHERS - 1} encoders, got {len(names) - 1}")
