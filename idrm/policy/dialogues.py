"""Preference pairs as TRL's trainers take them: prompts with completions, pairs of completions, or prompts alone.

A policy with a chat template gets messages, which TRL renders. One without gets the text that a reward model without
one reads: an HH dialogue, or bare contents; the completion begins where the prompt's last header ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from idrm.alignment.rendering import Message, plain_text
from idrm.errors import InputError
from idrm.preference import WITHOUT_MARGINS, load_preferences

_RESPONSE_HEADER = "\n\nAssistant:"


def prompt_text(prompt: Sequence[Message], conversational: bool) -> str:
    """What a policy without a chat template goes on from."""
    return plain_text(prompt, conversational).text + (_RESPONSE_HEADER if conversational else "")


def completion_text(prompt: Sequence[Message], response: Message, conversational: bool) -> str:
    """What it goes on with: prompt and completion together are the text of all messages."""
    whole = plain_text([*prompt, response], conversational).text
    return whole[len(prompt_text(prompt, conversational)) :]


def load_examples(action: str, source: str, split: str, has_chat_template: bool) -> tuple[Dataset, str]:
    """The data set of an action, and a line for the log.

    Args:
        action: "sft" (prompt and completion, the chosen response), "dpo" (prompt, chosen and rejected) or "prompts".
        source, split: as `idrm.preference.load_preferences` has them.
        has_chat_template: whether prompts and completions are messages, or text.

    Returns:
        (examples, summary). "prompts" has each prompt once, with the columns prompt, messages (of the prompt) and
        conversational.

    Raises:
        InputError: as `load_preferences`; DPO pairs whose prompts differ; no pair with a prompt.
    """
    pairs, report = load_preferences(source, split=split, columns=WITHOUT_MARGINS)
    seen: set[str] = set()
    kept = []
    for index, pair in enumerate(pairs):
        if len(pair["chosen"]) < 2:
            continue
        if action == "dpo" and pair["chosen"][:-1] != pair["rejected"][:-1]:
            continue
        prompt = repr(pair["chosen"][:-1])
        if action == "prompts" and prompt in seen:
            continue
        seen.add(prompt)
        kept.append(index)
    if not kept:
        raise InputError(f"{source}: no pair can be used: none has a prompt{', the same for both' * (action == 'dpo')}")

    def example(pair: Mapping[str, Any]) -> dict[str, Any]:
        return _example(action, pair, has_chat_template)

    examples = pairs.select(kept).map(
        example, remove_columns=pairs.column_names, load_from_cache_file=False, desc=f"Reading {source}"
    )
    left = "" if len(kept) == len(pairs) else f"; {len(pairs) - len(kept):,} left out ({_reason(action)})"
    return examples, f"{report.summary()}; {len(kept):,} examples{left}"


def _reason(action: str) -> str:
    return {
        "sft": "no prompt",
        "dpo": "no prompt, or not the same for both responses",
        "prompts": "no prompt, or one that is there already",
    }[action]


def _example(action: str, pair: Mapping[str, Any], has_chat_template: bool) -> dict[str, Any]:
    prompt, conversational = pair["chosen"][:-1], pair["conversational"]

    def completion(response: Message) -> list[Message] | str:
        return [response] if has_chat_template else completion_text(prompt, response, conversational)

    rendered = prompt if has_chat_template else prompt_text(prompt, conversational)
    if action == "sft":
        return {"prompt": rendered, "completion": completion(pair["chosen"][-1])}
    if action == "dpo":
        sides = {side: completion(pair[side][-1]) for side in ("chosen", "rejected")}
        return {"prompt": rendered, **sides}
    return {"prompt": rendered, "messages": prompt, "conversational": conversational}
