"""One policy's training, from flags to saved model, by TRL's trainers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, RLOOTrainer, SFTTrainer
from trl.experimental.ppo import PPOTrainer

from idrm.checkpointing import CheckpointingTrainer, save_model
from idrm.command_line import refused_arguments
from idrm.errors import InputError
from idrm.evaluation.reading import load_config, torch_dtype_of
from idrm.evaluation.reward_model import RewardModel, load_reward_model, require_reward_model
from idrm.models import longest_input
from idrm.partitioning import unpartitioned
from idrm.policy.arguments import PPO_MAX_PROMPT_LENGTH, REINFORCED, PolicyConfiguration, parse_arguments
from idrm.policy.dialogues import load_examples
from idrm.policy.models import (
    load_policy,
    load_policy_tokenizer,
    require_ending_template,
    require_shared_tokenizer,
    without_dropout,
)
from idrm.policy.prompts import short_prompts
from idrm.policy.reward import reward_function
from idrm.processes import prepare_training
from idrm.run_folder import resume_checkpoint, write_run_file

logger = logging.getLogger("idrm.policy")


class _SftTrainer(CheckpointingTrainer, SFTTrainer):
    """TRL's trainer, whose models and checkpoints are whole or not there."""


class _DpoTrainer(CheckpointingTrainer, DPOTrainer):
    """TRL's trainer, whose models and checkpoints are whole or not there."""


class _RlooTrainer(CheckpointingTrainer, RLOOTrainer):
    """TRL's trainer, whose models and checkpoints are whole or not there."""


class _PpoTrainer(CheckpointingTrainer, PPOTrainer):
    """TRL's trainer, whose policies are whole or not there, and saved under DeepSpeed too."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy without the value model; TRL's would hand DeepSpeed a module that is no engine."""
        both = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            prefix = "policy."
            weights = {name.removeprefix(prefix): weight for name, weight in both.items() if name.startswith(prefix)}
            policy = self.accelerator.unwrap_model(self.model).policy
            save_model(policy, self.processing_class, Path(output_dir or self.args.output_dir), weights)


def run(action: str, argv: Sequence[str]) -> None:
    """Trains what the flags of `idrm policy sft`, `dpo`, `rloo` or `ppo` ask for."""
    train(parse_arguments(action, argv))


def train(config: PolicyConfiguration) -> None:
    """One training run: checks and loads everything, trains, saves the policy, evaluates it.

    Raises:
        InputError: anything the user can put right; nothing has been written to the output folder then.
    """
    checkpoint = resume_checkpoint(config)
    name = config.policy.model_name_or_path
    remote_code = config.training["trust_remote_code"]
    tokenizer = load_policy_tokenizer(name, trust_remote_code=remote_code)
    if config.training.get("eos_token") is not None:
        # TRL sets it too, and refuses one that is not in the vocabulary.
        tokenizer.eos_token = config.training["eos_token"]
    require_ending_template(tokenizer, name, with_nothing_behind=config.action == "ppo")
    if config.reward_model is not None:
        require_reward_model(config.reward_model.reward_model_name_or_path, trust_remote_code=remote_code)
    if config.action == "ppo":
        # As generation needs it.
        tokenizer.padding_side = "left"
        require_shared_tokenizer(name, tokenizer, config.reward_model.reward_model_name_or_path, remote_code)
    args = prepare_training(config, f"--module idrm.policy {config.action}")
    with args.main_process_first(desc="reading pairs"):
        train_set = _examples(config, config.policy.dataset_name, config.policy.dataset_split, tokenizer)
        eval_set = None
        if config.policy.eval_dataset_name is not None:
            eval_set = _examples(config, config.policy.eval_dataset_name, config.policy.eval_dataset_split, tokenizer)

    def load() -> PreTrainedModel:
        return load_policy(
            name,
            dtype=config.policy.dtype,
            attn_implementation=config.policy.attn_implementation,
            trust_remote_code=remote_code,
        )

    if config.action == "ppo":
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(train_set) < batch:
            # TRL's loader drops it, and would look for another one for ever.
            raise InputError(f"{config.policy.dataset_name}: {len(train_set)} prompts make no batch of {batch}")
    with refused_arguments():
        trainer = _trainer(config, args, load, tokenizer, train_set, eval_set)
    if trainer.is_world_process_zero():
        write_run_file(config)
    if config.action == "ppo":
        trainer.train()
        metrics = {"train_episodes": trainer.state.episode}
    else:
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    trainer.report("train", {**metrics, "train_examples": len(train_set)})
    if eval_set is not None and config.action != "ppo":
        trainer.report("eval", trainer.evaluate())
    logger.info("The policy is in %s", config.output_dir)
    trainer.accelerator.end_training()


def _examples(config: PolicyConfiguration, source: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    kind = "prompts" if config.action in REINFORCED else config.action
    examples, summary = load_examples(kind, source, split, bool(tokenizer.chat_template))
    logger.info(summary)
    if config.reward_model is None:
        return examples
    is_ppo = config.action == "ppo"
    longest = config.reward_model.max_prompt_length or (PPO_MAX_PROMPT_LENGTH if is_ppo else None)
    examples, ids, summary = short_prompts(examples, tokenizer, longest)
    logger.info(summary)
    _require_room(config, max(map(len, ids)))
    return Dataset.from_dict({"input_ids": ids}) if is_ppo else examples


def _require_room(config: PolicyConfiguration, longest_prompt: int) -> None:
    """Refuses responses that leave the positions of a model that has to read them behind the longest prompt."""
    is_ppo = config.action == "ppo"
    flag = "response_length" if is_ppo else "max_completion_length"
    remote_code = config.training["trust_remote_code"]
    names = [config.policy.model_name_or_path]
    if is_ppo:
        names.append(config.reward_model.reward_model_name_or_path)
    for name in names:
        limit = longest_input(load_config(name, remote_code))
        if limit is not None and longest_prompt + (config.training[flag] or 0) > limit:
            raise InputError(
                f"--{flag} {config.training[flag]}: behind a prompt of {longest_prompt} tokens it leaves the {limit} "
                f"that {name} reads; give less, or a --max_prompt_length"
            )


def _trainer(
    config: PolicyConfiguration,
    args: Any,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset,
    eval_set: Dataset | None,
) -> CheckpointingTrainer:
    common = {
        "model": load(),
        "args": args,
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "processing_class": tokenizer,
    }
    if config.action == "sft":
        return _SftTrainer(**common)
    if config.action == "dpo":
        # TRL's own would have another dtype and attention.
        return _DpoTrainer(**common, ref_model=load())

    def reward_model() -> RewardModel:
        with unpartitioned():
            return load_reward_model(
                config.reward_model.reward_model_name_or_path,
                dtype=config.reward_model.reward_dtype,
                device=args.device,
                max_length=config.reward_model.reward_max_length,
                # TRL's PPO calls the model itself.
                share_prompt="off" if config.action == "ppo" else "auto",
                trust_remote_code=config.training["trust_remote_code"],
            )

    if config.action == "ppo":
        if args.deepspeed_plugin is not None:
            # The trainer makes an Accelerator of its own, which knows of DeepSpeed by what was set up before it.
            Accelerator(deepspeed_plugin=args.deepspeed_plugin)
        # TRL prepares a loader for evaluation in any case.
        common["eval_dataset"] = train_set if eval_set is None else eval_set
        # The value model begins as the reward model, in the policy's dtype.
        value = reward_model().model.to(common["model"].dtype).requires_grad_(True)
        for model in (common["model"], value):
            without_dropout(model)
            if args.gradient_checkpointing:
                # TRL's trainer says nothing of it to its models.
                model.gradient_checkpointing_enable(
                    {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}
                )
        return _PpoTrainer(**common, ref_model=load(), reward_model=reward_model().model, value_model=value)
    reward = reward_model()
    # Of the reference, which TRL loads from where the model came.
    args.model_init_kwargs = {
        "dtype": torch_dtype_of(config.policy.dtype),
        "attn_implementation": config.policy.attn_implementation,
        "use_safetensors": True,
    }
    return _RlooTrainer(**common, reward_funcs=reward_function(reward, config.reward_model.reward_batch_size))
