"""The texts of one segment: the canonical text that the teacher reads and the rendered text that the student reads.

Both contain the message contents in the same order, with other white space and other template text between them.
Counting the characters of the contents, white space left out, therefore gives every position of either text a
coordinate that means the same in both (DESIGN section 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import accumulate

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from idrm.errors import InputError

Message = dict[str, str]
Span = tuple[int, int]

_FROZEN_DATE = date(2024, 7, 26)  # the date that Llama's chat template names where it knows of no other
_HEADERS = {"user": "Human"}


class TemplateRefusal(Exception):
    """The chat template raised on these messages, for instance because their roles do not alternate."""


@dataclass(frozen=True)
class Text:
    """A segment's text and where in it the message contents stand, in characters and in order.

    `contents` is None where the chat template altered a content by more than the white space at its ends.
    """

    text: str
    contents: list[Span] | None

    def coordinates(self) -> list[int]:
        """For each position of the text (its end included) how many content characters, no white space, precede it."""
        in_content = bytearray(len(self.text))
        for start, end in self.contents or ():
            in_content[start:end] = b"\x01" * (end - start)
        counts = (inside and not character.isspace() for inside, character in zip(in_content, self.text, strict=True))
        return list(accumulate(counts, initial=0))


def canonical_text(messages: Sequence[Message]) -> Text:
    """The message contents joined by a newline: what the teacher reads of a segment."""
    return _concatenate([("" if index == 0 else "\n", message["content"]) for index, message in enumerate(messages)])


def plain_text(messages: Sequence[Message], conversational: bool) -> Text:
    """What a student without a chat template reads: an HH dialogue, or bare contents if not `conversational`."""
    return _concatenate(
        [
            (f"\n\n{_HEADERS.get(message['role'], message['role'].capitalize())}: " if conversational else "", content)
            for message in messages
            for content in [message["content"]]
        ]
    )


def _concatenate(parts: Sequence[tuple[str, str]]) -> Text:
    text, contents = "", []
    for before, content in parts:
        text += before
        contents.append((len(text), len(text) + len(content)))
        text += content
    return Text(text, contents)


def frozen_chat_template(template: str) -> str:
    """The chat template with today's date fixed, whether it asks for `date_string` or calls `strftime_now`.

    Rewards must not change from one day to the next. Freezing a frozen template changes nothing.
    """
    prefix = _frozen_date_prefix()
    return template if template.startswith(prefix) else prefix + template


@lru_cache(maxsize=1)
def _frozen_date_prefix() -> str:
    # A macro, because transformers turns every callable that is handed to a template into a string.
    replacements = "".join(
        f".replace('%{directive}', '{_FROZEN_DATE.strftime('%' + directive)}')" for directive in "aAbBdmyYjHIMSp"
    )
    # The newline, which goes with the block before it, lets the template begin on a line of its own.
    return (
        f"{{%- set date_string = '{_FROZEN_DATE:%d %b %Y}' -%}}"
        f"{{%- macro strftime_now(format) -%}}{{{{ format{replacements} }}}}{{%- endmacro %}}\n"
    )


class ChatRenderer:
    """Renders messages with a tokenizer's chat template, the date frozen, and finds the contents in the result."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InputError if the tokenizer has several templates and none of them is the default."""
        self._tokenizer = tokenizer
        try:
            self._template = frozen_chat_template(tokenizer.get_chat_template())
        except ValueError as error:
            raise InputError(f"{tokenizer.name_or_path}: {' '.join(str(error).split())}") from error
        self._between: dict[tuple[str, ...], list[str] | None] = {}

    def __call__(self, messages: Sequence[Message]) -> Text:
        """Render; raises TemplateRefusal with the template's own words."""
        text = self._render(messages)
        contents = [message["content"] for message in messages]
        roles = tuple(message["role"] for message in messages)
        if roles not in self._between:
            self._between[roles] = self._template_text(roles)
        between = self._between[roles]
        return Text(text, None if between is None else _find_contents(text, contents, between))

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False)
        except TemplateError as error:
            raise TemplateRefusal(str(error)) from error

    def _template_text(self, roles: Sequence[str]) -> list[str] | None:
        """What the template itself writes before, between and after contents of these roles; None if it reorders them.

        Known beforehand, so that the search for a content "user" does not end in a header.
        """
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        text = self._render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        between = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                return None
            between.append(before)
        return None if "\ue000" in text else [*between, text]


def _find_contents(text: str, contents: Sequence[str], between: Sequence[str]) -> list[Span] | None:
    """Forward search for the stripped contents, each right after the template text that belongs before it."""
    spans, cursor = [], 0
    for before, content in zip(between, [*contents, ""], strict=True):
        for piece in (before.strip(), content.strip()):
            start = text.find(piece, cursor)
            if start < 0 or text[cursor:start].strip():
                return None
            cursor = start + len(piece)
        spans.append((start, cursor))
    return None if text[cursor:].strip() else spans[:-1]
