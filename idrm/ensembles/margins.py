"""How much better the chosen response of every pair is, by several reward models: mean and deviation of their margins.

Source: "Secrets of RLHF in Large Language Models Part II", arXiv 2401.06080, section 2 (preference strength).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from idrm.errors import InputError
from idrm.evaluation.benchmark import Benchmark, Item, digest_of_items
from idrm.evaluation.evaluation import Scoring, evaluate_models
from idrm.preference import WITHOUT_MARGINS, convert_record, drop_reason

MEAN_COLUMN, DEVIATION_COLUMN = "margin_mean", "margin_deviation"
# The share of pairs, those of the lowest mean margins, whose labels the source flips.
FLIPPED_SHARE = 0.2


@dataclass(frozen=True)
class Margins:
    """What M models say of N pairs.

    Attributes:
        models: their M labels.
        by_model: (M, N) float64, reward of chosen minus reward of rejected; NaN where a model cannot read the pair, or
            where a response is empty.
    """

    models: tuple[str, ...]
    by_model: np.ndarray

    @cached_property
    def mean(self) -> np.ndarray:
        """(N,) float64, over the models; NaN where one of them says nothing."""
        return self.by_model.mean(axis=0)

    @cached_property
    def deviation(self) -> np.ndarray:
        """(N,) float64, the population's standard deviation over the models: divided by M, 0 for one model."""
        return self.by_model.std(axis=0)

    @cached_property
    def scored(self) -> np.ndarray:
        """(N,) bool: every model has read the pair."""
        return ~np.isnan(self.mean)

    @property
    def share_negative(self) -> float:
        """Of the scored pairs, those with a mean margin below 0: the models together prefer the rejected response."""
        return float((self.mean[self.scored] < 0).mean())

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Of the scored pairs' mean margins, the values below which these shares of them lie (linear interpolation)."""
        return [float(value) for value in np.quantile(self.mean[self.scored], shares)]

    @cached_property
    def agreement(self) -> float:
        """How often two of the models prefer the same response, or neither any: the mean over all pairs of models.

        1 for a single model.
        """
        signs = np.sign(self.by_model[:, self.scored])
        shares = [float((signs[a] == signs[b]).mean()) for a, b in combinations(range(len(signs)), 2)]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def share_unanimous(self) -> float:
        """Of the scored pairs, those in which all models prefer the same response, or none any."""
        signs = np.sign(self.by_model[:, self.scored])
        return float((signs == signs[0]).all(axis=0).mean())


def score_margins(
    records: Dataset, source: str, models: Mapping[str, str], scoring: Scoring, *, show_progress: bool = True
) -> Margins:
    """The margins of all records by all models, one model in memory at a time.

    Args:
        records: raw preference records of any format (`idrm.preference.convert_record`), none of which is left out.
        source: what they are called in errors.
        models: {label: folder or hub name}.
        scoring: how models are loaded and scored. Rewards depend on batches by rounding alone.

    Raises:
        InputError: a record that is no preference pair, named by its number; a model that cannot be scored; no pair
            that all models can read.
    """
    items: list[Item] = []
    places: list[int] = []
    for place, pair in enumerate(_pairs(records, source)):
        # There is nothing to read then, and training drops it too. Identical responses are read, and have margin 0.
        if drop_reason(pair) != "empty_response":
            items.append(Item("pairs", pair["chosen"], (pair["rejected"],), pair["conversational"]))
            places.append(place)
    pairs = Benchmark("margins", "pairs", source, f"digest {digest_of_items(items)}", items, [])
    by_model = np.full((len(models), len(records)), np.nan)
    for row, outcomes in enumerate(evaluate_models(models, [pairs], scoring, show_progress=show_progress)):
        by_model[row, places] = outcomes.chosen_reward - outcomes.best_rejected_reward
    margins = Margins(tuple(models), by_model)
    if not margins.scored.any():
        raise InputError(f"{source}: none of its {len(records):,} pairs can be read by all models")
    return margins


def write_with_margins(path: Path, records: Dataset, margins: Margins) -> None:
    """Writes JSON lines, whole or not there: every record as `records` has it, in order, with two columns more.

    `margin_mean` and `margin_deviation` are numbers that come back bit for bit, null where a pair was not scored.

    Raises:
        InputError: a value that JSON does not have, such as an image or a number that is not finite, or a folder that
            cannot be written to.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for record, mean, deviation in zip(records, margins.mean, margins.deviation, strict=True):
                added = {MEAN_COLUMN: _to_json(mean), DEVIATION_COLUMN: _to_json(deviation)}
                file.write(json.dumps({**record, **added}, ensure_ascii=False, allow_nan=False, default=_date) + "\n")
        os.replace(temporary, path)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"records hold a number that is not finite, which a JSON file cannot ({error})") from error
    except OSError as error:
        raise InputError(f"--output_file {path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_new_columns(columns: Iterable[str], source: str) -> None:
    """Raises InputError where the records have a column of the name of one that is to be added."""
    for name in (MEAN_COLUMN, DEVIATION_COLUMN):
        if name in columns:
            raise InputError(f"{source}: has a column {name} already; give the pairs without it")


def _pairs(records: Dataset, source: str) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records, start=1):
        try:
            yield convert_record(record, WITHOUT_MARGINS)
        except InputError as error:
            raise InputError(f"{source}: record {number}: {error}") from None


def _to_json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _date(value: Any) -> str:
    """Strings that look like dates are dates once `datasets` has read them."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise InputError(f"records hold a {type(value).__name__}, which a JSON file cannot; leave that column out")
