"""Token ids of prompts, ready for a policy to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from idrm.errors import InputError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Ids of prompts as `idrm.policy.dialogues` has them: messages, up to where the response begins, or text."""
    if tokenizer.chat_template:
        rendered = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts
        ]
        # The template writes a BOS itself.
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # A tokenizer that ends every text with EOS would end the prompt.
    eos = tokenizer.eos_token_id
    return [ids[:-1] if ids[-1:] == [eos] else ids for ids in tokenizer(list(prompts))["input_ids"]]


def tokenized_prompts(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, str]:
    """The prompts of at most max_length tokens as a data set of input_ids, and a line for the log.

    Padded on the left from here on, as generation needs it: the tokenizer is set so.

    Raises:
        InputError: all are longer.
    """
    tokenizer.padding_side = "left"
    kept = [ids for ids in prompt_ids(tokenizer, examples["prompt"][:]) if len(ids) <= max_length]
    if not kept:
        raise InputError(f"--max_prompt_length {max_length}: all {len(examples):,} prompts are longer")
    longer = len(examples) - len(kept)
    return Dataset.from_dict(
        {"input_ids": kept}
    ), f"prompts of up to {max_length} tokens: {len(kept):,}; {longer:,} longer"
