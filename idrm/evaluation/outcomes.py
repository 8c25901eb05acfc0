"""What one model decided, item by item, on one benchmark: the file that `idrm eval` writes and `idrm compare` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from idrm.errors import InputError
from idrm.run_folder import write_whole

FORMAT = "idrm outcomes 1"


@dataclass(frozen=True)
class Outcome:
    """One item: a chosen response and one or more rejected ones to the same prompt.

    Attributes:
        item: a digest of all its texts; equal for models that were asked the same.
        subset: the part of the benchmark that it belongs to.
        prompt: a digest of its prompt; items of one prompt share it.
        chosen_reward, rejected_rewards: NaN where the model cannot read the messages.
        chosen_length, rejected_lengths: tokens of the model's inputs; 0 where it cannot read the messages.
    """

    item: str
    subset: str
    prompt: str
    chosen_reward: float
    rejected_rewards: tuple[float, ...]
    chosen_length: int
    rejected_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Outcomes:
    """One model on one benchmark, items in the benchmark's order.

    Attributes:
        model: the label of the model.
        benchmark: the name of the benchmark.
        items: what became of each of its items.
        origin: what was measured and how (the model's path, the benchmark's source and version, settings); values that
            JSON has.
    """

    model: str
    benchmark: str
    items: Sequence[Outcome]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def subset(self) -> np.ndarray:
        """(items,) str, the subset of each."""
        return np.array([item.subset for item in self.items], dtype=str)

    @cached_property
    def prompt(self) -> np.ndarray:
        """(items,) str, the prompt of each: what a bootstrap draws."""
        return np.array([item.prompt for item in self.items], dtype=str)

    @cached_property
    def chosen_reward(self) -> np.ndarray:
        """(items,) float64."""
        return np.array([item.chosen_reward for item in self.items], dtype=float)

    @cached_property
    def best_rejected_reward(self) -> np.ndarray:
        """(items,) float64, the highest of the rejected responses; NaN where one of them could not be read."""
        return np.array([np.max(item.rejected_rewards) for item in self.items], dtype=float)

    @cached_property
    def won(self) -> np.ndarray:
        """(items,) bool: chosen is strictly better than every rejected response."""
        return self.chosen_reward > self.best_rejected_reward

    @cached_property
    def tied(self) -> np.ndarray:
        """(items,) bool: chosen is as good as the best rejected response, and no better. A tie is not won."""
        return self.chosen_reward == self.best_rejected_reward

    @cached_property
    def unread(self) -> np.ndarray:
        """(items,) bool: the model's chat template refuses the messages. What was not read is not won."""
        return np.isnan(self.chosen_reward) | np.isnan(self.best_rejected_reward)

    def length_won(self, prefer: str) -> np.ndarray:
        """(items,) bool: what `won` is for one who knows the lengths alone, and takes the "shorter" or the "longer"."""
        chosen = np.array([item.chosen_length for item in self.items])
        if prefer == "shorter":
            return chosen < np.array([min(item.rejected_lengths) for item in self.items])
        return chosen > np.array([max(item.rejected_lengths) for item in self.items])

    def within(self, subsets: Sequence[str]) -> Outcomes:
        """The items of these subsets alone."""
        kept = set(subsets)
        return Outcomes(self.model, self.benchmark, [item for item in self.items if item.subset in kept], self.origin)


def write_outcomes(path: Path, outcomes: Outcomes) -> None:
    """Writes JSON lines, whole or not there: what the file is and how many items follow, then an item a line."""
    head = {
        "format": FORMAT,
        "model": outcomes.model,
        "benchmark": outcomes.benchmark,
        "items": len(outcomes),
        "origin": dict(outcomes.origin),
    }
    lines = [head]
    for item in outcomes.items:
        values = asdict(item)
        values["chosen_reward"] = _to_json(item.chosen_reward)
        values["rejected_rewards"] = [_to_json(reward) for reward in item.rejected_rewards]
        lines.append(values)
    write_whole(Path(path), "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def read_outcomes(path: str | Path) -> Outcomes:
    """Reads what `write_outcomes` wrote; rewards come back bit for bit.

    Raises:
        InputError: the file is not there, is no such file, or is damaged (named by its line).
    """
    try:
        # Not splitlines, to which more characters end a line than JSON escapes.
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error.__class__.__name__})") from error
    try:
        head = json.loads(lines[0])
        known = head["format"] == FORMAT
    except (IndexError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise InputError(f"{path}: expected an outcomes file of `idrm eval` (its first line names {FORMAT!r})")
    items = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            items.append(_outcome(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: is damaged: expected an item of an outcomes file") from error
    if len(items) != head["items"] or not items:
        raise InputError(f"{path}: is damaged: expected {head['items']} items, found {len(items)}")
    return Outcomes(head["model"], head["benchmark"], items, head["origin"])


def require_same_items(first: Outcomes, second: Outcomes, first_name: str, second_name: str) -> None:
    """Raises InputError, which names both, where two models were not asked the same items in the same order."""
    if first.benchmark != second.benchmark:
        raise InputError(
            f"{first_name} and {second_name}: were measured on different benchmarks, {first.benchmark} and "
            f"{second.benchmark}"
        )
    if len(first) != len(second):
        raise InputError(
            f"{first_name} and {second_name}: hold different items of {first.benchmark}, {len(first)} and {len(second)}"
        )
    for number, (ours, theirs) in enumerate(zip(first.items, second.items, strict=True), start=1):
        if (ours.item, ours.subset) != (theirs.item, theirs.subset):
            raise InputError(
                f"{first_name} and {second_name}: hold different items of {first.benchmark}, the first of them item "
                f"{number}"
            )


def _outcome(values: Mapping[str, Any]) -> Outcome:
    rejected = tuple(_from_json(reward) for reward in values["rejected_rewards"])
    lengths = tuple(int(length) for length in values["rejected_lengths"])
    if not rejected or len(rejected) != len(lengths):
        raise ValueError
    return Outcome(
        item=values["item"],
        subset=values["subset"],
        prompt=values["prompt"],
        chosen_reward=_from_json(values["chosen_reward"]),
        rejected_rewards=rejected,
        chosen_length=int(values["chosen_length"]),
        rejected_lengths=lengths,
    )


def _to_json(reward: float) -> float | None:
    return None if math.isnan(reward) else float(reward)


def _from_json(reward: float | None) -> float:
    return math.nan if reward is None else float(reward)
