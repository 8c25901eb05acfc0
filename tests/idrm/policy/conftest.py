"""A tiny policy that can speak, a reward model of its vocabulary that has learnt something, and runs of the actions."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from idrm.arguments import parse_arguments as parse_reward_training
from idrm.policy.arguments import parse_arguments
from idrm.policy.training import train
from idrm.train import train as train_reward_model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUIET = ("--use_cpu", "true", "--disable_tqdm", "true")


@pytest.fixture(scope="session")
def save_untrained(tmp_path_factory, student_tokenizer):
    """save_untrained(kind, seed, **config): a Llama of two blocks with the students' vocabulary, saved."""

    def save(kind: type, seed: int, **values) -> Path:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {name: getattr(student_tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = LlamaConfig(vocab_size=len(student_tokenizer), max_position_embeddings=256, **size, **tokens, **values)
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("untrained")
        kind(config).save_pretrained(path)
        student_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def untrained_path(save_untrained) -> Path:
    return save_untrained(LlamaForCausalLM, 8)


@pytest.fixture(scope="session")
def chat_tokenizer(student_tokenizer):
    """The students' tokenizer with a chat template, which writes BOS and EOS itself."""
    tokenizer = copy.deepcopy(student_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def run_action():
    """run_action(action, folder, *flags): the folder, once the action has trained a policy there in this process."""

    def run(action: str, folder: Path, *flags: object) -> Path:
        train(parse_arguments(action, [*map(str, flags), "--output_dir", str(folder), *QUIET]))
        return folder

    return run


@pytest.fixture(scope="session")
def sft_path(tmp_path_factory, run_action, untrained_path, pairs_path, eval_pairs_path) -> Path:
    """The policy after forty steps of supervised fine-tuning."""
    return run_action(
        "sft",
        tmp_path_factory.mktemp("sft") / "out",
        *("--model_name_or_path", untrained_path, "--dataset_name", pairs_path, "--eval_dataset_name", eval_pairs_path),
        *("--max_steps", 40, "--learning_rate", 3e-3, "--save_steps", 20, "--logging_steps", 1),
    )


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory, save_untrained, pairs_path) -> Path:
    """A reward model that `idrm train` left, which likes kettles that boil."""
    path = tmp_path_factory.mktemp("reward") / "out"
    base = save_untrained(LlamaForSequenceClassification, 9, num_labels=1, initializer_range=0.2)
    flags = ("--model_name_or_path", base, "--dataset_name", pairs_path, "--alpha", 0, "--output_dir", path)
    flags = (*flags, "--num_train_epochs", 4, "--learning_rate", 3e-3, "--save_strategy", "no", *QUIET)
    train_reward_model(parse_reward_training([*map(str, flags)]))
    return path
