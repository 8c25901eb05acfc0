"""What a reward model's run is told: every flag with its default and meaning, and which of them contradict others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from idrm.command_line import RUN_FILE as RUN_FILE
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

# "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv 2307.09288, table 27.
_STRENGTH_LABELS = ("significantly better", "better", "slightly better", "negligibly better", "unsure")
LLAMA2_MARGINS = {
    "llama2_small": dict(zip(_STRENGTH_LABELS, (1.0, 2 / 3, 1 / 3, 0.0, 0.0), strict=True)),
    "llama2_large": dict(zip(_STRENGTH_LABELS, (3.0, 2.0, 1.0, 0.0, 0.0), strict=True)),
}
_NOT_RECORDED = ("embedded_seeds", "embedded_control")
# transformers' arguments that would do nothing here, or leave evaluation without its metrics.
_INAPPLICABLE = ("label_smoothing_factor", "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches")
# Those that are about training batches of a fixed number of pairs.
_FIXED_BATCHES = ("auto_find_batch_size", "dataloader_drop_last", "train_sampling_strategy")


@dataclass
class ModelArguments:
    """The student that becomes the reward model and the teacher that helps in training."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Student: a decoder's folder or hub name. Without model and data, the embedded demonstration runs."
        },
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a BERT-like, ModernBERT or DeBERTa encoder fine-tuned on NLI, folder or hub name; for "
            "alpha > 0."
        },
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Dtype that the student's weights are loaded in ('auto': as saved). To train in half precision, "
            "keep float32 and give --bf16 true."
        },
    )
    teacher_dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="auto", metadata={"help": "Dtype of the frozen teacher ('auto': as saved)."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the teacher's attention of every pair (bfloat16), so that later epochs and runs "
            "need no teacher forward. May be shared by runs; how much it takes is said before training."
        },
    )
    teacher_cache_max_gb: float | None = field(
        default=None,
        metadata={
            "help": "Most gigabytes (10^9 bytes) that all entries in --teacher_cache may take, counted when the run "
            "begins; for pairs beyond it the teacher runs in every epoch. Default: no limit but the disk's."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "The student's attention: eager, sdpa or flash_attention_2. Default: transformers' choice."},
    )
    teacher_attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's attention: sdpa, flashdeberta (DeBERTa in half precision on a GPU, an extra), "
            "flash_attention_2 (the other families) or eager, which holds maps of a block. Default: flashdeberta "
            "where it can run, else sdpa."
        },
    )
    pad_token: str | None = field(
        default=None,
        metadata={
            "help": "Padding token of the student, which must not be its EOS. Default: the tokenizer's own; where it "
            "has none, a token reserved for padding, else '<|pad|>' is added."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Probability in training of all dropouts that the student's configuration has; of Llama, Mistral "
            "and Qwen that is the attention's alone. Default: as the configuration says."
        },
    )
    linear_probing: bool = field(
        default=False,
        metadata={
            "help": "Train the reward head alone, all other weights frozen, by --alpha 0: the model that runs share "
            "which will be averaged."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the student's repository run its own code on this machine."}
    )


@dataclass
class DataArguments:
    """The preference pairs."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training pairs: a hub name, a .jsonl, .json, .jsonl.gz or .parquet file, or a folder. Recognised "
            "are HH-RLHF dialogues, prompt/chosen/rejected strings, conversational lists and TL;DR comparisons."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name to train on."})
    eval_dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairs to evaluate on. Several are given as name=path; their metrics are called eval_<name>_..."
        },
    )
    share_prompt: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Whether a batch's pairs stand in one row without padding, and what both sequences of a pair begin "
            "with is read once: the same rewards and gradients up to rounding, in less time. 'auto': where the student "
            "and its attention allow it; 'on': refuse those that do not."
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a device's micro-batch in training, which then takes as many pairs as fit, each "
            "prompt counted once, instead of --per_device_train_batch_size pairs; every pair weighs the same. Needs "
            "students that --share_prompt can be on for. Default: a fixed number of pairs."
        },
    )
    eval_dataset_split: str = field(
        default="test", metadata={"help": "Split of hub names and folders in --eval_dataset_name."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest student sequence in tokens. Default: 1024, or the student's own limit where that is lower."
        },
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest teacher input in tokens, both sequences together. Default: the teacher's limit, else 512."
        },
    )
    teacher_segment_order: Literal["chosen_first", "random"] = field(
        default="chosen_first",
        metadata={
            "help": "Which sequence the teacher reads first: chosen, or for every pair one drawn from its text and "
            "--data_seed (else --seed), so that its place in the joint input does not tell which one is better."
        },
    )
    teacher_long_inputs: Literal["cut", "windows"] = field(
        default="cut",
        metadata={
            "help": "Pairs longer than --teacher_max_length: cut from the left of the prompt, or read whole in several "
            "overlapping inputs (windows)."
        },
    )
    teacher_control: Literal["none", "uniform", "other_pair"] = field(
        default="none",
        metadata={
            "help": "A control experiment: the student imitates maps that know nothing of its pair, either those of an "
            "encoder that attends to all tokens alike (uniform), or the teacher's of another pair of the same data set "
            "(other_pair)."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data. Default: this one."}
    )


@dataclass
class InteractionArguments:
    """The interaction loss (DESIGN section 2)."""

    alpha: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the interaction loss: loss = preference loss + alpha * interaction loss. 0 is exactly "
            "Bradley-Terry, and loads no teacher."
        },
    )
    top_blocks: int | None = field(
        default=None,
        metadata={
            "help": "Supervise the last m blocks of both models, last with last. Default: 1. Not with the lists below."
        },
    )
    student_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Supervised student blocks, paired in order with --teacher_layers; negative: from the end."},
    )
    teacher_layers: list[int] | None = field(
        default=None, metadata={"help": "Teacher blocks, as many as --student_layers. Default of both: -1."}
    )
    intra_weight: float = field(
        default=1.0, metadata={"help": "Weight of the maps within the chosen and within the rejected sequence."}
    )
    inter_weight: float = field(
        default=1.0, metadata={"help": "Weight of the maps between the chosen and the rejected sequence."}
    )
    interaction_rows: Literal["all", "response"] = field(
        default="all",
        metadata={
            "help": "Rows of the maps that count: all units, or those of the response only (the prompt stays as keys)."
        },
    )
    num_head_groups: int = field(
        default=1,
        metadata={"help": "Groups that heads are averaged in before maps are compared; divides both head counts."},
    )
    normalization: Literal["block", "joint"] = field(
        default="block",
        metadata={
            "help": "Softmax over the keys of each sequence alone (block), or over both sequences' together (joint)."
        },
    )
    reduction: Literal["frobenius", "row", "row_sq"] = field(
        default="frobenius",
        metadata={"help": "How row distances become a block's loss: root of their sum, mean of roots, or plain mean."},
    )
    metric: Literal["l2", "kl"] = field(
        default="l2", metadata={"help": "Distance of two rows: squared l2, or KL (use with --reduction row_sq)."}
    )
    kernel_impl: Literal["auto", "triton", "cpp", "torch", "reference"] = field(
        default="auto",
        metadata={
            "help": "Implementation of the loss (auto: the best that runs here). The result does not depend on it."
        },
    )


@dataclass
class ObjectiveArguments:
    """The preference objective (docs/objectives.md): Bradley-Terry, and what it is combined with."""

    margin_column: str = field(
        default="margin",
        metadata={
            "help": "Column of the pairs that says by how much chosen is to be ahead: loss = -log sigmoid(chosen - "
            "rejected - margin). `idrm margins` writes margin_mean. One of another name than margin, the pairs "
            "have to have."
        },
    )
    margin_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Margins that words in --margin_column stand for, as label=number ...; or llama2_small or "
            "llama2_large, Llama 2's for its four labels (1, 2/3, 1/3, 0, and 3, 2, 1, 0)."
        },
    )
    flip_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training pairs whose labels are flipped, those lowest in --flip_column. 0.2 in the "
            "source; with a --margin_column a flipped pair's margin changes its sign."
        },
    )
    flip_column: str = field(
        default="margin_mean",
        metadata={
            "help": "Column by which labels are flipped: the mean margin that `idrm margins` writes, or another."
        },
    )
    preference_label_smoothing: float = field(
        default=0.0,
        metadata={"help": "How likely a label is taken to be wrong, below 0.5: the target is 1 - this."},
    )
    confidence_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight, below 1, of the reward model's own judgement in the target (weak-to-strong's confidence "
            "loss; 0.5 in the source). The order of every pair is drawn for it."
        },
    )
    confidence_warmup: float = field(
        default=0.2, metadata={"help": "Share of training over which --confidence_weight grows from 0."}
    )
    inform_latent_size: int | None = field(
        default=None,
        metadata={
            "help": "InfoRM: dimensions of a Gaussian bottleneck in the place of the reward head, 128 in the source; "
            "the saved model has a plain head of the same rewards. Default: no bottleneck."
        },
    )
    inform_beta: float = field(
        default=0.1, metadata={"help": "InfoRM: weight of the KL divergence of both sequences' latents."}
    )
    inform_kl: Literal["paper", "official"] = field(
        default="paper",
        metadata={
            "help": "InfoRM: the divergence summed over the latent's dimensions (paper), or that of the dimensions' "
            "average, as in the authors' code (official)."
        },
    )


@dataclass
class EmbeddedArguments:
    """The embedded demonstration, which runs where neither a model nor data is named."""

    embedded_seeds: int = field(
        default=1, metadata={"help": "Demonstration only: how many seeds it runs over, counted up from --seed."}
    )
    embedded_control: bool = field(
        default=False,
        metadata={"help": "Demonstration only: also train against a teacher whose maps are uniform, as a control."},
    )


_LOWER_IS_BETTER = ("interaction_ratio", "latent_kl")


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of reward models, plus what only reward models have.

    Labels and unused columns mean nothing to preference pairs: label_names is [] and remove_unused_columns False.
    """

    output_dir: str | None = field(
        default="idrm-output",
        metadata={"help": "Folder that receives the model, its tokenizer, checkpoints, metrics and run.yaml."},
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate. 8B reward models are published with 2e-6 to 9e-6."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning rate schedule (transformers' SchedulerType)."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two records of the log; below 1 a share of all steps."}
    )
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers to report to, such as tensorboard or wandb."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Adds this times the mean of (chosen + rejected reward)^2, which centres rewards. Default: off."
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
        # transformers knows this only of names that end with "loss".
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        self.label_names = []
        self.remove_unused_columns = False


@dataclass(frozen=True)
class RunConfiguration(TrainingRun[RewardTrainingArguments]):
    """One run as its user described it, before anything was loaded.

    Attributes:
        model, data, interaction, objective: our own arguments, checked against one another.
        embedded: what only the embedded demonstration reads.
    """

    model: ModelArguments
    data: DataArguments
    interaction: InteractionArguments
    objective: ObjectiveArguments
    embedded: EmbeddedArguments

    training_kind = RewardTrainingArguments
    own_arguments = (ModelArguments, DataArguments, InteractionArguments, ObjectiveArguments)
    free_to_change = (
        *("eval_dataset_name", "eval_dataset_split", "kernel_impl", "dataset_num_proc"),
        "teacher_cache_max_gb",
    )
    free_to_move = ("teacher_cache",)

    @property
    def is_embedded(self) -> bool:
        """Whether neither a model nor data is named: the embedded demonstration."""
        return self.model.model_name_or_path is None and self.data.dataset_name is None


_KINDS = (*RunConfiguration.own_arguments, EmbeddedArguments)


def _flag_parser() -> FlagParser:
    return FlagParser((*_KINDS, RewardTrainingArguments), "idrm train", named=("eval_dataset_name",))


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that a part of a command line gives, with their values, not yet held against one another.

    Raises:
        InputError: an unknown flag, or a value of the wrong kind.
    """
    return _flag_parser().values(argv)[1]


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfiguration:
    """Parses the command line and the YAML file that it may name; the command line wins.

    Raises:
        InputError: an unknown flag or YAML key, a value of the wrong kind, or arguments that contradict one another.
    """
    parser = _flag_parser()
    values, given = parser.values(argv)
    model, data, interaction, objective, embedded = (kind(**fields_of(kind, values)) for kind in _KINDS)
    defaults = parser.defaults()
    _check(model, data, interaction, values, defaults)
    _check_objective(objective, values, defaults)
    _check_embedded(model, data, embedded, given)
    return RunConfiguration(
        training=fields_of(RewardTrainingArguments, values),
        given=given,
        recorded=recorded_values(values, defaults, RunConfiguration.own_argument_names(), _NOT_RECORDED),
        model=model,
        data=data,
        interaction=interaction,
        objective=objective,
        embedded=embedded,
    )


def own_argument_names() -> list[str]:
    """Names of the arguments that are this project's and not transformers'."""
    return RunConfiguration.own_argument_names()


def named_evaluation_sets(names: Sequence[str] | None) -> dict[str, str]:
    """The entries of --eval_dataset_name as {name: path} (`idrm.command_line.named_sets`)."""
    return named_sets("eval_dataset_name", names)


def _check(
    model: ModelArguments,
    data: DataArguments,
    interaction: InteractionArguments,
    values: dict[str, Any],
    defaults: dict[str, Any],
):
    """What can be told from the arguments alone."""
    if data.dataset_name is not None and model.model_name_or_path is None:
        raise InputError(f"--dataset_name {data.dataset_name} needs a model to train: give --model_name_or_path")
    if model.model_name_or_path is not None and data.dataset_name is None:
        raise InputError(f"--model_name_or_path {model.model_name_or_path} needs data: give --dataset_name")
    named_evaluation_sets(data.eval_dataset_name)
    require_at_least(
        values,
        {
            "alpha": 0.0,
            "intra_weight": 0.0,
            "inter_weight": 0.0,
            "num_head_groups": 1,
            "top_blocks": 1,
            "max_length": 8,
            "teacher_max_length": 8,
            "tokens_per_batch": 1,
            "teacher_cache_max_gb": 0.0,
            "dataset_num_proc": 1,
            "dropout": 0.0,
        },
    )
    if model.dropout is not None and model.dropout >= 1:
        raise InputError(f"--dropout: expected less than 1, got {model.dropout}")
    require_trainable(values)
    require_defaults(values, defaults, _INAPPLICABLE, "preference pairs")
    if data.tokens_per_batch is not None:
        require_defaults(values, defaults, _FIXED_BATCHES, "batches of --tokens_per_batch")
        if data.share_prompt == "off":
            raise InputError(
                f"--tokens_per_batch {data.tokens_per_batch}: counts the tokens of a row without padding in which each "
                "prompt stands once; leave --share_prompt off out"
            )
    if interaction.alpha > 0 and interaction.intra_weight == interaction.inter_weight == 0:
        raise InputError("--intra_weight and --inter_weight are both 0: no map counts; give --alpha 0 instead")
    if interaction.top_blocks and (interaction.student_layers or interaction.teacher_layers):
        raise InputError(
            "--top_blocks and --student_layers/--teacher_layers say the same thing twice: give one of them"
        )
    student_blocks, teacher_blocks = paired_layers(interaction)
    if len(student_blocks) != len(teacher_blocks):
        raise InputError(
            f"--student_layers and --teacher_layers are paired in order: got {len(student_blocks)} and "
            f"{len(teacher_blocks)} blocks"
        )
    trains = model.model_name_or_path is not None
    if trains and model.linear_probing and interaction.alpha > 0:
        raise InputError("--linear_probing: the interaction loss does not reach the reward head; give --alpha 0")
    if trains and interaction.alpha > 0 and model.teacher_name_or_path is None:
        raise InputError(f"--alpha {interaction.alpha:g} needs a teacher: give --teacher_name_or_path, or --alpha 0")
    if model.teacher_cache == "":
        raise InputError("--teacher_cache: expected a folder, got an empty name")
    if model.teacher_cache is not None and interaction.alpha == 0:
        raise InputError("--teacher_cache: --alpha 0 has no teacher; leave it out")
    if model.teacher_cache_max_gb is not None and model.teacher_cache is None:
        raise InputError(f"--teacher_cache_max_gb {model.teacher_cache_max_gb:g}: caps no cache; give --teacher_cache")
    if data.teacher_control != "none" and interaction.alpha == 0:
        raise InputError(f"--teacher_control {data.teacher_control}: --alpha 0 has no teacher; leave it out")
    if data.teacher_control == "uniform" and model.teacher_cache is not None:
        raise InputError("--teacher_cache: --teacher_control uniform runs no teacher; leave it out")
    if data.teacher_control == "other_pair" and data.teacher_long_inputs == "windows":
        raise InputError("--teacher_control other_pair: is for pairs that are read in one input; leave windows out")
    if trains and data.eval_dataset_name is None and values["eval_strategy"] != "no":
        raise InputError(
            f"--eval_strategy {values['eval_strategy']} needs pairs to evaluate on: give --eval_dataset_name"
        )
    require_saving_deepspeed(values["deepspeed"])


def _check_objective(objective: ObjectiveArguments, values: dict[str, Any], defaults: dict[str, Any]):
    """Of the preference objective, what has a range, and what would do nothing as given."""
    margins_of_labels(objective.margin_labels)
    require_at_least(
        values,
        {
            "flip_fraction": 0.0,
            "preference_label_smoothing": 0.0,
            "confidence_weight": 0.0,
            "confidence_warmup": 0.0,
            "inform_latent_size": 1,
            "inform_beta": 0.0,
        },
    )
    for flag, limit in (("preference_label_smoothing", 0.5), ("confidence_weight", 1.0)):
        if values[flag] >= limit:
            raise InputError(f"--{flag}: expected less than {limit:g}, got {values[flag]:g}")
    for flag in ("flip_fraction", "confidence_warmup"):
        if values[flag] > 1:
            raise InputError(f"--{flag}: expected at most 1, got {values[flag]:g}")
    for flag, needed in (
        ("flip_column", "flip_fraction"),
        ("confidence_warmup", "confidence_weight"),
        ("inform_beta", "inform_latent_size"),
        ("inform_kl", "inform_latent_size"),
    ):
        if values[flag] != defaults[flag] and not values[needed]:
            raise InputError(f"--{flag} {values[flag]}: does nothing without --{needed}")
    one_pair = values["tokens_per_batch"] is None and values["per_device_train_batch_size"] == 1
    if objective.confidence_weight and one_pair:
        raise InputError(
            f"--confidence_weight {objective.confidence_weight:g}: compares the pairs of a batch; give "
            "--per_device_train_batch_size 2 or more"
        )


def margins_of_labels(labels: Sequence[str] | None) -> dict[str, float]:
    """The entries of --margin_labels as {label in lower case: margin}.

    Raises:
        InputError: an entry that is no label=number, or a label that is given twice.
    """
    margins: dict[str, float] = {}
    for entry in labels or ():
        label, _, number = entry.rpartition("=")
        if entry in LLAMA2_MARGINS:
            given = LLAMA2_MARGINS[entry]
        else:
            try:
                given = {label.strip().lower(): float(number)}
            except ValueError:
                given = {}
            if not label.strip() or not all(map(math.isfinite, given.values())) or not given:
                raise InputError(f"--margin_labels {entry}: expected label=number, {' or '.join(LLAMA2_MARGINS)}")
        for name, margin in given.items():
            if name in margins:
                raise InputError(f"--margin_labels {entry}: {name!r} is given twice")
            margins[name] = margin
    return margins


def _check_embedded(model: ModelArguments, data: DataArguments, embedded: EmbeddedArguments, given: dict[str, Any]):
    """Flags of the demonstration belong to it alone, and it brings its own teacher and data."""
    if embedded.embedded_seeds < 1:
        raise InputError(f"--embedded_seeds: expected at least 1, got {embedded.embedded_seeds}")
    if model.model_name_or_path is None and data.dataset_name is None:
        misplaced = {"teacher_name_or_path", "teacher_cache", "teacher_control", "eval_dataset_name"} & given.keys()
        reason = "needs a model and data: give --model_name_or_path and --dataset_name"
    else:
        misplaced = {"embedded_seeds", "embedded_control"} & given.keys()
        reason = "is for the embedded demonstration, which runs without a model and data"
    if misplaced:
        raise InputError(f"--{min(misplaced)} {reason}")


def paired_layers(interaction: InteractionArguments) -> tuple[list[int], list[int]]:
    """The supervised student blocks and the teacher blocks they are paired with, as the user counts them."""
    if interaction.top_blocks:
        top = list(range(-1, -interaction.top_blocks - 1, -1))
        return top, top
    return interaction.student_layers or [-1], interaction.teacher_layers or [-1]
