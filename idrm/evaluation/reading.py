"""Messages as a model that is evaluated reads them: exactly what training feeds a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from idrm.alignment import PairEncoder
from idrm.alignment.encoding import MIN_LENGTH
from idrm.alignment.rendering import Message, TemplateRefusal
from idrm.capture.teacher import FAMILIES
from idrm.command_line import length_within
from idrm.errors import InputError, refusals, require_folder
from idrm.models import longest_input

# What RewardBench's own scripts cut to.
DEFAULT_MAX_LENGTH = 2048
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


class MessageReader:
    """Token ids of messages: through the chat template, its date frozen, or as plain text with EOS at the end.

    What is too long loses whole units from the left of the prompt, the response last (`idrm.alignment.PairEncoder`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Raises InputError for a tokenizer of several chat templates, or a length under 8."""
        self._pairs = PairEncoder(tokenizer, None, max_length=max_length, teacher_max_length=MIN_LENGTH)

    def one(self, messages: Sequence[Message], conversational: bool) -> list[int]:
        """The ids of one sequence; raises TemplateRefusal where the chat template refuses it."""
        return self.pair(messages, messages, conversational)[0]

    def pair(
        self, chosen: Sequence[Message], rejected: Sequence[Message], conversational: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of both sequences of a pair, cut as in training: a prompt that both have at the same place of it."""
        record = {"chosen": chosen, "rejected": rejected, "conversational": conversational, "margin": None}
        encoded = self._pairs(record)
        if encoded["refusal"]:
            raise TemplateRefusal(encoded["refusal"])
        if not encoded["chosen_input_ids"] or not encoded["rejected_input_ids"]:
            raise TemplateRefusal("there is no token to read")
        return encoded["chosen_input_ids"], encoded["rejected_input_ids"]

    def response_tokens(self, messages: Sequence[Message], conversational: bool) -> int:
        """How many of the last tokens are the response's; TemplateRefusal where the template altered a content."""
        tokens = self._pairs.response_tokens(messages, conversational)
        if tokens is None:
            raise TemplateRefusal("the chat template alters a content, so that the response cannot be found")
        return tokens


def load_config(name_or_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """A model's configuration; InputError where there is none that can be loaded."""
    require_folder(name_or_path, name_or_path)
    with refusals(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def load_whole(
    auto: type, name_or_path: str, *, what: str | None = None, dtype: str, **options: Any
) -> PreTrainedModel:
    """A model from a folder or the hub, from safetensors only, none of whose weights is missing there.

    Args:
        auto: transformers' class for its kind, such as `AutoModelForCausalLM`.
        what: what an error calls it; None for its name.
        dtype: as `torch_dtype_of` has it.
        options: of `from_pretrained`: config, attn_implementation, trust_remote_code.

    Raises:
        InputError: nothing loadable there, or weights that the checkpoint lacks.
    """
    what = name_or_path if what is None else what
    with refusals(what):
        model, loading = auto.from_pretrained(
            name_or_path, dtype=torch_dtype_of(dtype), use_safetensors=True, output_loading_info=True, **options
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{what}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}: "
            "no such model was saved there"
        )
    return model


def load_tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """A model's fast tokenizer; InputError where there is none, or one that knows no token."""
    with refusals(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(f"{name_or_path}: has no fast tokenizer (tokenizer.json), whose offsets say where to cut")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{name_or_path}: no vocabulary found; expected a tokenizer beside the weights")
    return tokenizer


def readable_length(config: PreTrainedConfig, asked: int | None) -> int:
    """The most tokens of a sequence: what was asked, or DEFAULT_MAX_LENGTH, or the model's limit where it is lower.

    Raises:
        InputError: more was asked than the model reads, or less than 8.
    """
    family = next((family for family in FAMILIES if config.model_type in family.model_types), None)
    limit = longest_input(config) if family is None else family.max_length(config)
    length = length_within("max_length", asked, limit, DEFAULT_MAX_LENGTH)
    if length < MIN_LENGTH:
        raise InputError(f"--max_length: expected at least {MIN_LENGTH} tokens, got {length}")
    return length


def torch_dtype_of(name: str) -> torch.dtype | str:
    """The dtype that a flag names, as `from_pretrained` takes it."""
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)
