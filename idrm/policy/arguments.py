"""What `idrm policy sft`, `dpo`, `rloo` and `ppo` are told: TRL's arguments with our defaults, and what is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from trl import DPOConfig, RLOOConfig, SFTConfig
from trl.experimental.ppo import PPOConfig

from idrm.command_line import (
    FlagParser,
    TrainingRun,
    fields_of,
    recorded_values,
    require_at_least,
    require_defaults,
    require_saving_deepspeed,
    require_trainable,
)
from idrm.errors import InputError


@dataclass
class PolicyArguments:
    """The policy, and the preference pairs whose chosen responses, pairs or prompts it learns from."""

    action: str | None = field(
        default=None, metadata={"help": "In a run.yaml: which of sft, dpo, rloo and ppo wrote it, and may read it."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Language model to train: folder or hub name. For the others than sft, the SFT model."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Dtype that the weights are loaded in ('auto': as saved). To train in half precision, keep float32 "
            "and give --bf16 true."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2. Default: transformers' choice."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference pairs of any source and format that `idrm train` takes (HH-RLHF, TL;DR, ...)."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Pairs to evaluate on."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of --eval_dataset_name."})


@dataclass
class RewardModelArguments:
    """The reward model that rloo and ppo maximise: any sequence classifier of one label.

    For rloo it has its own tokenizer; for ppo the policy's, whose ids it reads.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: a folder that `idrm train` left, or any other of one label."}
    )
    reward_dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="auto", metadata={"help": "Dtype of the frozen reward model ('auto': as saved)."}
    )
    reward_max_length: int | None = field(
        default=None,
        metadata={
            "help": "rloo: longest sequence that the reward model reads, cut from the left of the prompt. Default: "
            "2048, or its limit where that is lower."
        },
    )
    reward_batch_size: int = field(default=16, metadata={"help": "rloo: most sequences that it scores at once."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt in tokens; longer ones are left out, and counted. Default: any for rloo, 512 for "
            "ppo."
        },
    )


@dataclass
class _Defaults:
    """Ours where TRL's would surprise: nothing is reported, and half precision is used where it is asked for."""

    output_dir: str | None = field(
        default="idrm-policy",
        metadata={"help": "Folder that receives the policy, its tokenizer, checkpoints, metrics and run.yaml."},
    )
    bf16: bool = field(default=False, metadata={"help": "Train under autocast in bfloat16."})
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers to report to, such as tensorboard or wandb."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the last complete checkpoint in --output_dir (no value, or true), or from this folder.",
            "nargs": "?",
            "const": "true",
        },
    )


@dataclass
class SftTrainingArguments(_Defaults, SFTConfig):
    """TRL's SFTConfig. The loss is that of the responses alone (`completion_only_loss`)."""


@dataclass
class DpoTrainingArguments(_Defaults, DPOConfig):
    """TRL's DPOConfig."""


@dataclass
class RlooTrainingArguments(_Defaults, RLOOConfig):
    """TRL's RLOOConfig."""


@dataclass
class PpoTrainingArguments(_Defaults, PPOConfig):
    """TRL's PPOConfig. A response ends at EOS, and no samples are printed."""

    stop_token: Literal["eos"] | None = field(
        default="eos", metadata={"help": "Where a response is cut before it is scored: eos, or nowhere."}
    )
    num_sample_generations: int = field(
        default=0, metadata={"help": "How often samples are printed while it trains; needs --eval_dataset_name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the models' repositories run their own code on this machine."}
    )

    @property
    def world_size(self) -> int:
        """The number of ranks, which PPOConfig overrides by a field that is None until its trainer fills it in."""
        return TrainingArguments.world_size.fget(self)

    @world_size.setter
    def world_size(self, value: int | None) -> None:
        """Takes what the field or the trainer says, which is either None or the same."""


TRAINING_KINDS = {
    "sft": SftTrainingArguments,
    "dpo": DpoTrainingArguments,
    "rloo": RlooTrainingArguments,
    "ppo": PpoTrainingArguments,
}
REINFORCED = ("rloo", "ppo")
PPO_MAX_PROMPT_LENGTH = 512
# TRL's PPO trainer counts episodes, evaluates nothing and cannot go on from a checkpoint; the rest it works out itself,
# takes from our flags, or never looks at.
_NOT_FOR_PPO = (
    *("max_steps", "eval_strategy", "resume_from_checkpoint", "load_best_model_at_end"),
    *("sft_model_path", "reward_model_path", "num_total_batches", "batch_size", "local_batch_size", "micro_batch_size"),
    *("mini_batch_size", "local_mini_batch_size", "reward_max_length", "reward_batch_size"),
)


@dataclass(frozen=True)
class PolicyConfiguration(TrainingRun):
    """One policy's run as its user described it, before anything was loaded.

    Attributes:
        action: "sft", "dpo", "rloo" or "ppo", whose arguments `training` has.
        policy: our own arguments. reward_model: those of rloo's and ppo's reward, None for the others.
    """

    action: str
    policy: PolicyArguments
    reward_model: RewardModelArguments | None

    own_arguments = (PolicyArguments,)
    free_to_change = ("eval_dataset_name", "eval_dataset_split")

    @property
    def training_kind(self) -> type:
        return TRAINING_KINDS[self.action]


@dataclass(frozen=True)
class ReinforcedConfiguration(PolicyConfiguration):
    """One that maximises a reward."""

    own_arguments = (PolicyArguments, RewardModelArguments)
    free_to_change = (*PolicyConfiguration.free_to_change, "reward_batch_size")


def parse_arguments(action: str, argv: Sequence[str]) -> PolicyConfiguration:
    """Parses the flags of an action and the YAML file that they may name; the command line wins.

    Raises:
        InputError: an unknown flag or YAML key, a value of the wrong kind, or one that is missing.
    """
    configuration = ReinforcedConfiguration if action in REINFORCED else PolicyConfiguration
    parser = FlagParser((*configuration.own_arguments, TRAINING_KINDS[action]), f"idrm policy {action}")
    values, given = parser.values(argv)
    if values["action"] not in (None, action):
        raise InputError(f"--action {values['action']}: this is idrm policy {action}")
    values["action"] = action
    needed = {"model_name_or_path": "the language model", "dataset_name": "the preference pairs"}
    if action in REINFORCED:
        needed["reward_model_name_or_path"] = "the reward model"
    for flag, meaning in needed.items():
        if not values[flag]:
            raise InputError(f"--{flag} is missing: give {meaning}")
    if values["eval_strategy"] != "no" and values["eval_dataset_name"] is None:
        raise InputError(
            f"--eval_strategy {values['eval_strategy']} needs pairs to evaluate on: give --eval_dataset_name"
        )
    if action in REINFORCED:
        require_at_least(values, {"reward_batch_size": 1, "reward_max_length": 8, "max_prompt_length": 8})
    if action == "ppo":
        require_defaults(values, parser.defaults(), _NOT_FOR_PPO, "TRL's PPO trainer")
        _check_ppo(values, parser.defaults())
    require_trainable(values)
    require_saving_deepspeed(values["deepspeed"])
    return configuration(
        training=fields_of(TRAINING_KINDS[action], values),
        given=given,
        recorded=recorded_values(values, parser.defaults(), configuration.own_argument_names()),
        action=action,
        policy=PolicyArguments(**fields_of(PolicyArguments, values)),
        reward_model=RewardModelArguments(**fields_of(RewardModelArguments, values)) if action in REINFORCED else None,
    )


def _check_ppo(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """What TRL's PPO trainer would pass over, or fail at once all is loaded."""
    if bool(values["num_sample_generations"]) != (values["eval_dataset_name"] is not None):
        raise InputError(
            "--num_sample_generations: needs pairs to answer, which --eval_dataset_name is for: give both or neither"
        )
    if values["max_grad_norm"] != defaults["max_grad_norm"] and values["deepspeed"] is None:
        raise InputError("--max_grad_norm: TRL's PPO trainer clips no gradient but under --deepspeed; leave it out")
    if values["num_mini_batches"] > 1 and values["gradient_accumulation_steps"] > 1:
        raise InputError(
            "--num_mini_batches: TRL's PPO trainer makes one update of all micro-batches that are accumulated; give "
            "--gradient_accumulation_steps 1 with it"
        )
    if values["save_strategy"] == "epoch":
        raise InputError("--save_strategy epoch: TRL's PPO trainer knows no epochs; give steps or no")
    require_at_least(values, {"total_episodes": 1, "num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 1})
    if not values["temperature"] > 0:
        raise InputError(f"--temperature: expected more than 0, got {values['temperature']:g}")
    rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    if rows % values["num_mini_batches"]:
        raise InputError(
            f"--num_mini_batches {values['num_mini_batches']}: does not divide the {rows} responses of a device"
        )
    if values["whiten_rewards"] and rows // values["num_mini_batches"] < 8:
        raise InputError("--whiten_rewards: needs mini-batches of 8 responses a device or more")
