"""One raw preference record, whatever its format, becomes two lists of messages.

Formats, told apart by the record's keys and the types of their values (names as in TRL):

- HH-RLHF dialogue: `chosen` and `rejected` are whole strings "\\n\\nHuman: ...\\n\\nAssistant: ..." (the beginning may
  stand in `prompt`);
- `prompt`, `chosen`, `rejected` strings, or `chosen` and `rejected` alone, whose common beginning is the prompt;
- conversational: `chosen` and `rejected` are lists of {"role", "content"}, with the prompt inside them or in `prompt`;
- TL;DR comparison: `info` (the post), `summaries` (two texts) and `choice` (0 or 1).

A `margin` (how much better chosen is) may stand beside any of them, under this or another name (`PairColumns`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from idrm.errors import InputError

Message = dict[str, str]

STRENGTH_COLUMN = "strength"

_DIALOGUE_START = re.compile(r"\s*(?:Human|System):")
_TURN = re.compile(r"\A\s*(Human|System):|\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class PairColumns:
    """Where a record says how much better its chosen response is.

    Attributes:
        margin: key of the margin that the loss subtracts; None for whom margins are nothing to.
        margin_labels: the margins that words under this key stand for, in lower case; numbers are margins themselves.
        strength: key of a preference strength, below 0 where the label seems wrong; None for none.
    """

    margin: str | None = "margin"
    margin_labels: Mapping[str, float] = field(default_factory=dict)
    strength: str | None = None


WITHOUT_MARGINS = PairColumns(margin=None)


def convert_record(record: Mapping[str, Any], columns: PairColumns | None = None) -> dict[str, Any]:
    """Convert one record of any supported format.

    Returns {"chosen": messages, "rejected": messages, "conversational": bool, "margin": float | None}, a message being
    {"role": str, "content": str}. The last message of each list is the response, those before it are the prompt.
    `conversational` is False for pairs of bare strings, whose plain rendering is the concatenation of the contents.
    With `columns.strength` there is "strength", float | None, too.

    Raises InputError, without saying which record it was, for missing keys and for values of a wrong type.
    """
    columns = columns or PairColumns()
    present = {key: value for key, value in record.items() if value is not None}
    margin = None if columns.margin is None else _number(present, columns.margin, columns.margin_labels)
    numbers = {"margin": margin}
    if columns.strength is not None:
        numbers[STRENGTH_COLUMN] = _number(present, columns.strength)
    if {"info", "summaries", "choice"} <= present.keys():
        chosen, rejected = _comparison(present)
        conversational = False
    elif not {"chosen", "rejected"} <= present.keys():
        found = ", ".join(repr(key) for key in present) or "none"
        raise InputError(
            f"expected the keys 'chosen' and 'rejected' (or 'info', 'summaries' and 'choice'), found {found}"
        )
    elif isinstance(present["chosen"], str) and isinstance(present["rejected"], str):
        chosen, rejected, conversational = _strings(present)
    else:
        chosen, rejected = (_conversation(present, side) for side in ("chosen", "rejected"))
        conversational = True
    return {"chosen": chosen, "rejected": rejected, "conversational": conversational, **numbers}


def drop_reason(pair: Mapping[str, Any]) -> str | None:
    """Why a converted pair cannot be learnt from: "empty_response", "identical_responses", or None if it can.

    White space at the ends of a content makes no difference: most chat templates strip it.
    """
    if any(not messages or not messages[-1]["content"].strip() for messages in (pair["chosen"], pair["rejected"])):
        return "empty_response"
    chosen, rejected = (
        [(message["role"], message["content"].strip()) for message in messages]
        for messages in (pair["chosen"], pair["rejected"])
    )
    return "identical_responses" if chosen == rejected else None


def _number(record: Mapping[str, Any], key: str, labels: Mapping[str, float] | None = None) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if labels and isinstance(value, str):
        margin = labels.get(value.strip().lower())
        if margin is None:
            raise InputError(f"expected one of {', '.join(map(repr, labels))} as {key!r}, found {value!r}")
        return margin
    # Of a batch they are float32.
    if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= torch.finfo(torch.float32).max:
        raise InputError(f"expected a finite number as {key!r}, found {value!r}")
    return float(value)


def _is_dialogue(text: str) -> bool:
    return bool(_DIALOGUE_START.match(text)) and "\n\nAssistant:" in text


def _dialogue(text: str) -> list[Message]:
    """Split an HH dialogue at its role headers. White space around a turn says nothing and goes."""
    headers = list(_TURN.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    return [
        {"role": _ROLES[header[1] or header[2]], "content": text[header.end() : end].strip()}
        for header, end in zip(headers, ends, strict=True)
    ]


def _continued_dialogue(prompt: str, response: str) -> list[Message]:
    if prompt.rstrip().endswith("\n\nAssistant:") or response.startswith("\n\nAssistant:"):
        return _dialogue(prompt + response)
    return [*_dialogue(prompt), {"role": "assistant", "content": response.strip()}]


def _strings(record: Mapping[str, Any]) -> tuple[list[Message], list[Message], bool]:
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if not isinstance(prompt, str | None):
        raise InputError(f"expected a string as 'prompt' beside string responses, found {type(prompt).__name__}")
    if _is_dialogue(chosen) and _is_dialogue(rejected) and chosen.startswith(prompt or ""):
        return _dialogue(chosen), _dialogue(rejected), True
    if prompt is None:
        prompt, chosen, rejected = _split_common_beginning(chosen, rejected)
    elif _DIALOGUE_START.match(prompt):
        return _continued_dialogue(prompt, chosen), _continued_dialogue(prompt, rejected), True
    messages = [{"role": "user", "content": prompt}] if prompt else []
    return (
        [*messages, {"role": "assistant", "content": chosen}],
        [*messages, {"role": "assistant", "content": rejected}],
        False,
    )


def _split_common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """TRL's implicit prompt: what both strings begin with, cut back to a word's end that leaves both a response."""
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    end = next(
        (
            i
            for i in range(min(common, shorter - 1), 0, -1)
            if chosen[i].isspace() and rejected[i].isspace() and chosen[i:].strip() and rejected[i:].strip()
        ),
        0,
    )
    return chosen[:end], chosen[end:], rejected[end:]


def _conversation(record: Mapping[str, Any], side: str) -> list[Message]:
    messages, prompt = _messages(record[side], side), record.get("prompt")
    if prompt is None:
        return messages
    if not isinstance(prompt, str):
        return _messages(prompt, "prompt") + messages
    if messages and messages[0]["role"] != "assistant":  # the prompt repeated as a column of its own
        return messages
    return [{"role": "user", "content": prompt}, *messages]


def _messages(value: Any, key: str) -> list[Message]:
    expected = f"expected a list of {{'role', 'content'}} messages with string values as {key!r}"
    if not isinstance(value, list):
        raise InputError(f"{expected}, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping):
            raise InputError(f"{expected}, found a list of {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"{expected}, found a message with {key} {message.get(key)!r:.80}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _comparison(record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """A TL;DR comparison; the post is worded as in "Learning to summarize from human feedback", arXiv 2009.01325."""
    info, summaries, choice = record["info"], record["summaries"], record["choice"]
    if not isinstance(info, Mapping) or not (info.get("post") or info.get("article")):
        raise InputError("expected 'info' to hold a 'post' or an 'article'")
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(summary, Mapping) and isinstance(summary.get("text"), str) for summary in summaries)
    ):
        raise InputError("expected 'summaries' to be two objects with a string 'text'")
    if choice not in (0, 1):
        raise InputError(f"expected 0 or 1 as 'choice', found {choice!r}")
    parts = [
        f"{label}: {info[key]}"
        for label, key in (("SUBREDDIT", "subreddit"), ("TITLE", "title"), ("POST", "post"), ("ARTICLE", "article"))
        if info.get(key)
    ]
    if info.get("subreddit"):
        parts[0] = f"SUBREDDIT: r/{info['subreddit'].removeprefix('r/')}"
    prompt = {"role": "user", "content": "\n\n".join([*parts, "TL;DR:"])}
    chosen, rejected = (
        [prompt, {"role": "assistant", "content": " " + summaries[index]["text"].strip()}]
        for index in (choice, 1 - choice)
    )
    return chosen, rejected
