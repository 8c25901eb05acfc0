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


def short_prompts(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, list[list[int]], str]:
    """Those of the examples whose prompts have at most max_length tokens, None for any.

    Returns:
        (examples, ids, summary): their prompts' ids, and a line for the log.

    Raises:
        InputError: all are longer.
    """
    ids = prompt_ids(tokenizer, examples["prompt"][:])
    if max_length is None:
        return examples, ids, f"prompts of up to {max(map(len, ids))} tokens: {len(ids):,}"
    kept = [index for index, prompt in enumerate(ids) if len(prompt) <= max_length]
    if not kept:
        raise InputError(f"--max_prompt_length {max_length}: all {len(examples):,} prompts are longer")
    summary = f"prompts of up to {max_length} tokens: {len(kept):,}; {len(examples) - len(kept):,} longer, left out"
    return examples.select(kept), [ids[index] for index in kept], summary
