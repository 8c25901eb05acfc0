"""Flips the labels that several reward models believe to be wrong.

Source: "Secrets of RLHF in Large Language Models Part II", arXiv 2401.06080, section 2: the labels of the pairs with
the lowest mean margins, 20% there, are mostly wrong, and flipping helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from datasets import Dataset

from idrm.errors import InputError
from idrm.preference import STRENGTH_COLUMN


@dataclass(frozen=True)
class FlippedLabels:
    """What was flipped: `flipped` of the `judged` pairs, those of `pairs` that have a preference strength.

    `highest` is the greatest strength that was flipped, None where none was.
    """

    pairs: int
    judged: int
    flipped: int
    highest: float | None

    def summary(self) -> str:
        """One line for the log."""
        kept = f"; {self.pairs - self.judged:,} have none and stay" if self.judged < self.pairs else ""
        upto = "" if self.highest is None else f", up to {self.highest:.4f}"
        return f"labels flipped: {self.flipped:,} of {self.judged:,} pairs, of the lowest strength{upto}{kept}"


def flip_labels(pairs: Dataset, fraction: float) -> tuple[Dataset, FlippedLabels]:
    """Exchanges chosen and rejected of the pairs with the lowest preference strength.

    Args:
        pairs: converted pairs with the column `strength` (`idrm.preference.PairColumns`): above 0 where chosen is
            better. Pairs where it is None keep their labels.
        fraction: of the pairs that have a strength, 0 to 1. floor(fraction * pairs) are flipped; of equal strengths
            the first ones.

    Returns:
        (pairs, report): in the same order. A flipped pair's margin changes its sign: what was asked of the difference
        chosen - rejected was said of the same two responses.

    Raises:
        InputError: no pair has a strength.
    """
    strengths = pairs[STRENGTH_COLUMN][:]
    judged = sorted((strength, index) for index, strength in enumerate(strengths) if strength is not None)
    if not judged:
        raise InputError("--flip_fraction: no training pair has a value in --flip_column")
    # 0.29 * 100 is 28.999999999999996.
    lowest = judged[: math.floor(fraction * len(judged) + 1e-9)]
    report = FlippedLabels(len(pairs), len(judged), len(lowest), lowest[-1][0] if lowest else None)
    if not lowest:
        return pairs, report
    flipped = {index for _, index in lowest}

    def exchanged(pair: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in flipped:
            return {}
        margin = None if pair["margin"] is None else -pair["margin"]
        return {"chosen": pair["rejected"], "rejected": pair["chosen"], "margin": margin}

    of_these = ",".join(str(index) for index in sorted(flipped))
    return (
        pairs.map(
            exchanged,
            with_indices=True,
            new_fingerprint=sha256(f"{pairs._fingerprint} flipped {of_these}".encode()).hexdigest()[:32],
            load_from_cache_file=False,
            desc="Flipping labels",
        ),
        report,
    )
