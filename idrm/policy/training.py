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
from idrm.evaluation.reward_model import RewardModel, load_reward_model, require_reward_model
from idrm.partitioning import unpartitioned
from idrm.policy.arguments import REINFORCED, PolicyConfiguration, parse_arguments
from idrm.policy.dialogues import load_examples
from idrm.policy.models import load_policy, load_policy_tokenizer, require_shared_tokenizer
from idrm.policy.prompts import tokenized_prompts
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
    if config.reward_model is not None:
        require_reward_model(config.reward_model.reward_model_name_or_path, trust_remote_code=remote_code)
    if config.action == "ppo":
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
    if config.action != "ppo":
        return examples
    examples, summary = tokenized_prompts(examples, tokenizer, config.reward_model.max_prompt_length)
    logger.info(summary)
    return examples


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
        # TRL loads the reference from where the model came.
        return _DpoTrainer(**common)

    def reward_model() -> RewardModel:
        with unpartitioned():
            return load_reward_model(
                config.reward_model.reward_model_name_or_path,
                dtype=config.reward_model.reward_dtype,
                device=args.device,
                max_length=config.reward_model.reward_max_length,
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
        return _PpoTrainer(**common, ref_model=load(), reward_model=reward_model().model, value_model=value)
    reward = reward_model()
    return _RlooTrainer(**common, reward_funcs=reward_function(reward, config.reward_model.reward_batch_size))
