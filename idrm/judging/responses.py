"""Response files: what one model answered to a list of prompts, and the pairs that two of them make.

A file is JSON lines, each with `prompt` (a string, or a list of {"role", "content"} messages), `response` (a string)
and possibly `id` (a string or an integer). A string is the same prompt as one user message with this content.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idrm.errors import InputError
from idrm.judging.judge import Message

# Of a prompt, in an error line.
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Response:
    """One line of a response file; `where` is its file and line, for errors."""

    prompt: tuple[Message, ...]
    text: str
    identifier: str | int | None
    where: str


@dataclass(frozen=True)
class ResponsePair:
    """Two models' responses to one prompt."""

    prompt: tuple[Message, ...]
    a: str
    b: str
    identifier: str | int | None = None


def read_responses(path: str | Path) -> list[Response]:
    """Reads a response file; blank lines are passed over.

    Raises:
        InputError: the file cannot be read or is empty, or a line is malformed; named by file and line.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8: {error.reason}") from error
    # Not splitlines(), which also ends lines at characters that JSON strings may hold.
    responses = [
        _response(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not responses:
        raise InputError(f"{path}: holds no responses")
    return responses


def match_responses(a: Sequence[Response], b: Sequence[Response]) -> list[ResponsePair]:
    """The pairs of two files' responses, in the first one's order.

    Where every response of both has an id, ids are matched, and the prompts of a pair have to be equal; else prompts.

    Raises:
        InputError: an id or prompt that is twice in one file or missing in the other, or unequal prompts; named by file
            and line.
    """
    by_identifier = all(response.identifier is not None for response in (*a, *b))
    indexed_a, indexed_b = (_indexed(responses, by_identifier) for responses in (a, b))
    for own, others, of_others in ((indexed_a, indexed_b, b), (indexed_b, indexed_a, a)):
        missing = [response for key, response in own.items() if key not in others]
        if missing:
            file = of_others[0].where.rpartition(":")[0]
            count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(
                f"{missing[0].where}: {_shown(missing[0], by_identifier)} has no counterpart in {file}{count}"
            )
    pairs = []
    for key, response in indexed_a.items():
        other = indexed_b[key]
        if response.prompt != other.prompt:
            raise InputError(f"{response.where}, {other.where}: the prompts of {_shown(response, True)} differ")
        pairs.append(ResponsePair(response.prompt, response.text, other.text, response.identifier))
    return pairs


def _response(line: str, where: str) -> Response:
    try:
        record = json.loads(line)
        # A lone surrogate is legal in JSON and in no request.
        json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON: {error.msg} (column {error.colno})") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: malformed JSON: {error.reason}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    missing = [key for key in ("prompt", "response") if record.get(key) is None]
    if missing:
        raise InputError(f"{where}: expected the keys 'prompt' and 'response', found no {missing[0]!r}")
    if not isinstance(record["response"], str):
        raise InputError(f"{where}: expected a string as 'response', found {type(record['response']).__name__}")
    identifier = record.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        raise InputError(f"{where}: expected a string or an integer as 'id', found {type(identifier).__name__}")
    return Response(_prompt(record["prompt"], where), record["response"], identifier, where)


def _prompt(prompt: Any, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    fields = ("role", "content")
    if (
        not isinstance(prompt, list)
        or not prompt
        or not all(isinstance(message, dict) for message in prompt)
        or not all(isinstance(message.get(field), str) for message in prompt for field in fields)
    ):
        raise InputError(
            f"{where}: expected as 'prompt' a string, or a list of {{'role', 'content'}} messages with string values"
        )
    return tuple(Message(message["role"], message["content"]) for message in prompt)


def _indexed(responses: Sequence[Response], by_identifier: bool) -> dict[Hashable, Response]:
    indexed: dict[Hashable, Response] = {}
    for response in responses:
        before = indexed.setdefault(response.identifier if by_identifier else response.prompt, response)
        if before is not response:
            advice = "" if by_identifier else "; give every line of both files an 'id'"
            raise InputError(
                f"{response.where}: {_shown(response, by_identifier)} is already in {before.where}{advice}"
            )
    return indexed


def _shown(response: Response, by_identifier: bool) -> str:
    if by_identifier:
        return f"id {response.identifier!r}"
    text = " ".join(response.prompt[-1].content.split())
    return f"prompt {text[:_SHOWN_CHARACTERS] + '...' if len(text) > _SHOWN_CHARACTERS else text!r}"
