"""What a judge is: whoever says which of two responses to a prompt is the better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

Preference: TypeAlias = Literal["first", "second", "tie"]


class Message(NamedTuple):
    """One message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two responses.

    Attributes:
        preference: the response that it prefers, by its place, or "tie"; None where its answer could not be read.
        answers: its words, one string for each time that it was asked; the last is the one that counts.
        requests: how many of these answers were asked for now, and not found in a cache.
        answered_by: the name that a model gave itself, where it did: often a dated one.
    """

    preference: Preference | None
    answers: tuple[str, ...] = ()
    requests: int = 0
    answered_by: str | None = None


class Judge(Protocol):
    """Anything that compares two responses; see `EndpointJudge` for one behind a chat completions endpoint."""

    def verdict(self, prompt: tuple[Message, ...], first: str, second: str) -> Verdict:
        """Compares two responses to a prompt, read in this order.

        It is called from as many threads at once as `judge_pairs` is told. An answer that cannot be read is a verdict
        without a preference, never a tie; InputError is for what ends the comparison.
        """
        ...
