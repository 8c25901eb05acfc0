"""What an inspection found, in numbers: one teacher or several side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from idrm.errors import InputError
from idrm.inspection.measures import BlockMeasures, Crossing, Structure

# An accuracy counts as above chance from so many standard errors on.
STANDARD_ERRORS = 3
# Most pairs that are measured, unless told otherwise.
DEFAULT_MAX_PAIRS = 64
MOST_TEACHERS = 26  # side by side, each under a letter


@dataclass(frozen=True)
class LabelAccuracy:
    """How often examples of one label were told right: a share in [0, 1] of a count."""

    accuracy: float
    examples: int


@dataclass(frozen=True)
class NliAccuracy:
    """Accuracy of an NLI classifier, over all examples and for each label of the data.

    Attributes:
        with_other_premises: its accuracy where every hypothesis stands beside another pair's premise; None where that
            was not measured.
    """

    accuracy: float
    examples: int
    per_label: dict[str, LabelAccuracy]
    with_other_premises: float | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> NliAccuracy:
        """From {"accuracy": .., "examples": .., "per_label": {label: {"accuracy": .., "examples": ..}}}.

        "with_other_premises" may be there, too.
        """
        try:
            labels = {label: LabelAccuracy(**entry) for label, entry in value["per_label"].items()}
            return cls(value["accuracy"], value["examples"], labels, value.get("with_other_premises"))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"accuracy: expected accuracy, examples, and per_label with both for each label; found {value!r}"
            ) from error

    @property
    def chance(self) -> float:
        """Accuracy of the best answer that does not look at the example: the most frequent label."""
        return max((label.examples for label in self.per_label.values()), default=0) / max(self.examples, 1)

    @property
    def is_above_chance(self) -> bool:
        """By STANDARD_ERRORS of a share that is ``chance``, and at least one example more."""
        return self._is_above(self.chance)

    @property
    def reads_both(self) -> bool | None:
        """Whether the true premises help, by the same measure; None where that was not measured."""
        return None if self.with_other_premises is None else self._is_above(self.with_other_premises)

    def _is_above(self, share: float) -> bool:
        error = math.sqrt(share * (1 - share) / max(self.examples, 1))
        return self.accuracy > share + STANDARD_ERRORS * error


@dataclass(frozen=True)
class PairCounts:
    """What became of the pairs: `given` records, `chosen` of them at even distances, `measured` + `dropped` = chosen.

    Attributes:
        dropped: counts by reason.
        cut: measured pairs that were too long for the teacher and lost a part.
        tokens, tokens_in_no_unit: content tokens of the measured pairs' whole texts, and those of them that stand for
            no text and are in no map.
    """

    given: int
    chosen: int
    measured: int
    cut: int
    tokens: int
    tokens_in_no_unit: int
    dropped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the table."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        return (
            f"{self.measured:,} pairs measured, of {self.given:,} given; dropped: {reasons}; cut to its length: "
            f"{self.cut:,}; tokens in no unit: {self.tokens_in_no_unit:,} of {self.tokens:,}"
        )


@dataclass(frozen=True)
class TeacherFindings:
    """One teacher.

    Attributes:
        name: as it was given.
        num_layers: the depth of its model.
        max_length: tokens of a joint input, at most.
        is_nli_classifier: whether its checkpoint has a head for NLI's labels.
        accuracy: on NLI; None where none was measured.
        pairs: what became of the pairs.
        blocks: measures by layer, counted from 0, ascending.
    """

    name: str
    num_layers: int
    max_length: int
    is_nli_classifier: bool
    accuracy: NliAccuracy | None
    pairs: PairCounts
    blocks: dict[int, BlockMeasures]

    def from_end(self, layer: int) -> int:
        """The same layer counted from the end, -1 the last."""
        return layer - self.num_layers

    def label(self, layer: int) -> str:
        """How a block is named: from the start and from the end."""
        return f"{layer} ({self.from_end(layer)})"

    @property
    def most_row_specific_layer(self) -> int:
        """The layer with the most row-specific structure between the responses; of equals the last one."""
        return max(self.blocks, key=lambda layer: (self.blocks[layer].responses.row_specific_distance, layer))


@dataclass(frozen=True)
class HeatMap:
    """Which map the picture shows: of which record, under which normalisation, and the layer of each teacher."""

    pair: int
    normalization: str
    layers: list[int]


@dataclass(frozen=True)
class Inspection:
    """One or several teachers over the same pairs, the one in question first.

    Attributes:
        teachers: findings in the order asked for.
        interaction_rows: the rows that were looked at, "all" or "response".
        heat_map: what check.png shows.
    """

    teachers: list[TeacherFindings]
    interaction_rows: str
    heat_map: HeatMap

    def letter(self, index: int) -> str:
        """What a teacher is called in tables."""
        return chr(ord("A") + index)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "interaction_rows": self.interaction_rows,
            "teachers": [_teacher_dict(teacher) for teacher in self.teachers],
            "heat_map": vars(self.heat_map),
        }


def _teacher_dict(teacher: TeacherFindings) -> dict[str, Any]:
    accuracy = teacher.accuracy
    return {
        "name": teacher.name,
        "num_layers": teacher.num_layers,
        "max_length": teacher.max_length,
        "is_nli_classifier": teacher.is_nli_classifier,
        "accuracy": accuracy
        and {
            "accuracy": accuracy.accuracy,
            "examples": accuracy.examples,
            "chance": accuracy.chance,
            "with_other_premises": accuracy.with_other_premises,
            "per_label": {label: vars(entry) for label, entry in accuracy.per_label.items()},
        },
        "pairs": vars(teacher.pairs),
        "blocks": [
            {
                "layer": layer,
                "layer_from_end": teacher.from_end(layer),
                **{name: _measure_value(measure) for name, measure in vars(block).items()},
            }
            for layer, block in teacher.blocks.items()
        ],
    }


def _measure_value(measure: Crossing | Structure | float | None) -> Any:
    if isinstance(measure, Crossing):
        return {**vars(measure), "ratio": measure.ratio}
    return vars(measure) if isinstance(measure, Structure) else measure
