"""Preference data from the hub, a file or a folder: every record is converted, and every dropped pair is counted."""

import os
from dataclasses import dataclass, field

from datasets import Dataset, Features, Value

from idrm.errors import InputError
from idrm.preference.formats import STRENGTH_COLUMN, PairColumns, convert_record, drop_reason
from idrm.sources import convert_records, load_records

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_FEATURES = Features(
    {
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "conversational": Value("bool"),
        "margin": Value("float64"),
    }
)


@dataclass(frozen=True)
class PreferenceReport:
    """What became of the records of one source: `read` = `kept` + the sum of `dropped` (a count for each reason)."""

    source: str
    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        return f"{self.source}: {self.read:,} pairs read, {self.kept:,} kept; dropped: {reasons}"


def load_preferences(
    source: str,
    *,
    split: str = "train",
    cache_dir: str | os.PathLike | None = None,
    keep_all: bool = False,
    columns: PairColumns | None = None,
) -> tuple[Dataset, PreferenceReport]:
    """Load preference pairs and convert each of them to messages (`formats.convert_record`).

    Args:
        source, split, cache_dir: as `idrm.sources.load_records` has them.
        keep_all: also what nothing can be learnt from, and a model can be tested on.
        columns: where records say how much better chosen is. A record without a key has no margin, or no strength.

    Returns:
        (dataset, report): the dataset has the columns chosen and rejected (lists of {"role", "content"}),
        conversational (bool), margin (float or None) and, with `columns.strength`, strength (float or None), without
        the pairs that `formats.drop_reason` names unless all are kept.

    Raises:
        InputError: the source does not exist or is empty, JSON is malformed (named by file and line), a record lacks
            keys or holds other types than expected (named by its number), or no pair is left.
    """
    columns = columns or PairColumns()
    records = load_records(source, split=split, cache_dir=cache_dir)

    def convert(record: dict) -> tuple[dict, str]:
        pair = convert_record(record, columns)
        if not keep_all:
            return pair, drop_reason(pair) or ""
        if not pair["chosen"] or not pair["rejected"]:
            raise InputError("expected messages on both sides, found none")
        return pair, ""

    features = _FEATURES if columns.strength is None else Features({**_FEATURES, STRENGTH_COLUMN: Value("float64")})
    pairs, dropped = convert_records(records, source, convert, features)
    report = PreferenceReport(source, read=len(records), kept=len(pairs), dropped=dropped)
    if not report.kept:
        raise InputError(f"no pair can be used ({report.summary()})")
    return pairs, report
