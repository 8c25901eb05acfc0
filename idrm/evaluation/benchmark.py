"""What a benchmark is: items to decide, and scores that are weighted means over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from idrm.alignment.rendering import Message


@dataclass(frozen=True)
class Item:
    """A chosen response and the rejected ones that it has to beat, all of them.

    Attributes:
        subset: the part of the benchmark that it belongs to.
        chosen: messages, the last of them the response.
        rejected: the same for one response, or several in best-of-N.
        conversational: False for bare strings (`idrm.preference`).
    """

    subset: str
    chosen: Sequence[Message]
    rejected: Sequence[Sequence[Message]]
    conversational: bool = True

    @property
    def key(self) -> str:
        """A digest of its texts."""
        return digest([_texts(self.chosen), *map(_texts, self.rejected)])

    @property
    def prompt_key(self) -> str:
        """A digest of its prompt, which other items may share."""
        return digest(_texts(self.chosen[:-1]))


@dataclass(frozen=True)
class Part:
    """Subsets whose items count alike, and the weight of their accuracy in a score."""

    name: str
    weight: float
    subsets: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """A weighted mean of the accuracies of parts; a subset may be in several.

    Attributes:
        name: as the table has it.
        parts: with positive weights, in any unit.
        is_detail: one of the many that an overview leaves out.
    """

    name: str
    parts: tuple[Part, ...]
    is_detail: bool = False

    def of(self, accuracies: Mapping[str, float]) -> float:
        """The score from the accuracies of its parts, by their names."""
        total = sum(part.weight for part in self.parts)
        return sum(part.weight * accuracies[part.name] for part in self.parts) / total

    def within(self, subset: np.ndarray, decided: np.ndarray) -> float:
        """The score from decisions: (items,) subsets and (items,) bool."""
        return self.of({part.name: float(decided[np.isin(subset, part.subsets)].mean()) for part in self.parts})


def mean_of_scores(name: str, weighted: Iterable[tuple[Score, float]]) -> Score:
    """The score that is the weighted mean of others, each of which has a part of every name at most once."""
    parts = []
    for score, weight in weighted:
        total = sum(part.weight for part in score.parts)
        parts += [Part(part.name, weight * part.weight / total, part.subsets) for part in score.parts]
    return Score(name, tuple(parts))


@dataclass(frozen=True)
class Benchmark:
    """Items, and the scores that are reported of them.

    Attributes:
        name: in tables and file names.
        kind: "rewardbench", "rmb" or "pairs".
        source: where the items are from.
        version: what tells them from another version's.
        items: in the order in which outcomes are kept.
        scores: the main ones first.
        notes: what a reader of the scores has to know.
    """

    name: str
    kind: str
    source: str
    version: str
    items: Sequence[Item]
    scores: Sequence[Score]
    notes: Sequence[str] = field(default_factory=tuple)


def digest(value: object) -> str:
    """Of texts in lists, 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def digest_of_items(items: Sequence[Item]) -> str:
    """Of all texts and subsets, in order."""
    return digest([[item.subset, item.key] for item in items])


def _texts(messages: Sequence[Message]) -> list[list[str]]:
    return [[message["role"], message["content"]] for message in messages]
