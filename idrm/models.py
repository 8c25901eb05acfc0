"""The student: its tokenizer with a safe pad token, and its weights with a reward head."""

from __future__ import annotations

import logging

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from idrm.alignment import frozen_chat_template
from idrm.arguments import ModelArguments
from idrm.capture.teacher import FAMILIES
from idrm.errors import InputError, refusals, require_folder

logger = logging.getLogger(__name__)

ADDED_PAD_TOKEN = "<|pad|>"
# Tokens that published vocabularies reserve for padding without naming them as the pad token.
RESERVED_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")

# What configurations of decoders call the probabilities of their dropouts.
DROPOUT_FIELDS = (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "emb_pdrop", "resid_pdrop", "hidden_dropout", "dropout"),
    *("residual_dropout", "embedding_dropout", "resid_dropout", "embed_dropout", "activation_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def load_student_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The student's configuration, set up for one reward.

    Raises:
        InputError: nothing loadable there, an encoder, a classifier of several labels, or a dropout asked of a model
            without any.
    """
    name = arguments.model_name_or_path
    require_folder(f"--model_name_or_path {name}", name)
    with refusals(f"--model_name_or_path {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    if any(config.model_type in family.model_types for family in FAMILIES):
        raise InputError(
            f"--model_name_or_path {name}: is an encoder ({config.model_type}); the student is a decoder, and an "
            "encoder its teacher"
        )
    is_classifier = any("ForSequenceClassification" in architecture for architecture in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise InputError(
            f"--model_name_or_path {name}: is a classifier of {config.num_labels} labels; expected a language model, "
            "or a reward model with one"
        )
    config.num_labels = 1
    # Without it, transformers' pipeline and vLLM would return sigmoid(reward).
    config.problem_type = "regression"
    if arguments.dropout is not None:
        _set_dropout(config.get_text_config(), arguments.dropout)
    return config


def _set_dropout(config: PreTrainedConfig, probability: float) -> None:
    names = [name for name in DROPOUT_FIELDS if isinstance(getattr(config, name, None), (int, float))]
    if not names:
        raise InputError(f"--dropout {probability}: a {config.model_type} has no dropout that could be set")
    for name in names:
        setattr(config, name, probability)
    logger.info("Dropout %g: %s.", probability, ", ".join(names))


def load_student_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The student's fast tokenizer with a pad token that is not its EOS and a chat template that knows no other date.

    Raises:
        InputError: nothing loadable there, a slow tokenizer, or a pad token that is the EOS token.
    """
    name = arguments.model_name_or_path
    with refusals(f"--model_name_or_path {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(f"--model_name_or_path {name}: has no fast tokenizer (tokenizer.json), which gives offsets")
    if isinstance(tokenizer.chat_template, str):
        # What is saved must render tomorrow what was trained on today.
        tokenizer.chat_template = frozen_chat_template(tokenizer.chat_template)
    vocabulary = tokenizer.get_vocab()
    if arguments.pad_token is not None:
        _set_pad_token(tokenizer, arguments.pad_token, vocabulary)
    elif tokenizer.pad_token is None:
        reserved = (token for token in RESERVED_PAD_TOKENS if token in vocabulary)
        _set_pad_token(tokenizer, next(reserved, ADDED_PAD_TOKEN), vocabulary)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            f"--model_name_or_path {name}: its pad token is its EOS token {tokenizer.eos_token!r}, which hides the end "
            f"of a sequence from the reward head; give another one, such as --pad_token '{ADDED_PAD_TOKEN}'"
        )
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, token: str, vocabulary: dict[str, int]) -> None:
    origin = "of the vocabulary" if token in vocabulary else "which is added to the vocabulary"
    tokenizer.add_special_tokens({"pad_token": token})
    logger.info("The student pads with %r (%d), %s.", token, tokenizer.pad_token_id, origin)


def load_student(
    arguments: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The student with a reward head, from safetensors only; partitioned where ZeRO-3 is set up.

    Its embeddings are enlarged for tokens that the tokenizer has beyond them, and its config knows the pad token. With
    `linear_probing` all but its head is frozen.

    Raises:
        InputError: weights that cannot be loaded, or an attention implementation that transformers does not know.
    """
    with refusals(f"--model_name_or_path {arguments.model_name_or_path}"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            dtype=torch_dtype(arguments.dtype) or "auto",
            attn_implementation=arguments.attn_implementation,
            trust_remote_code=arguments.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    new = sorted(loading["missing_keys"])
    if new:
        logger.info("Newly initialised, to be learnt in this run: %s.", ", ".join(new))
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        logger.info("The student's embeddings have %d rows now, %d before.", len(tokenizer), rows)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if arguments.linear_probing:
        model.base_model.requires_grad_(False)
    return model


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype that a flag names, None for 'auto'."""
    return None if name == "auto" else getattr(torch, name)


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that a model reads at most by its configuration, None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
