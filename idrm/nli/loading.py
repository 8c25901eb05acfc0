"""NLI data from the hub, a file or a folder: premise, hypothesis, and a label whose meaning is read from the data.

Formats, told apart by their keys: `premise`, `hypothesis`, `label` (an integer or a name), and those of SNLI's and
MultiNLI's own files, `sentence1`, `sentence2`, `gold_label` (a name, "-" where the annotators did not agree).
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from idrm.errors import InputError
from idrm.sources import convert_records, load_records

# SNLI's and MultiNLI's order on the hub, which integers without names are taken to follow.
NLI_LABELS = ("entailment", "neutral", "contradiction")

_KEYS = (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label"))
_FEATURES = Features({name: Value("string") for name in ("premise", "hypothesis", "label")})


@dataclass(frozen=True)
class NliReport:
    """What became of the records of one source: `read` = `kept` + the sum of `dropped` (a count for each reason).

    Attributes:
        labels: how often each label is among those kept, in the order of the data set that came out.
        assumed: the labels were integers without names, and were taken to be in SNLI's order.
    """

    source: str
    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    assumed: bool = False

    def summary(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        counts = ", ".join(f"{count:,} {label}" for label, count in self.labels.items())
        kept = f"{self.kept:,} kept" + (f" ({counts})" if counts else "")
        line = f"{self.source}: {self.read:,} pairs read, {kept}; dropped: {reasons}"
        return line + ("; its labels are integers without names, taken to be in SNLI's order" if self.assumed else "")


def load_nli(
    source: str,
    *,
    split: str = "train",
    label_names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Dataset, tuple[str, ...], NliReport]:
    """Load premise-hypothesis pairs with their labels.

    A label's name comes from the data's features (a ClassLabel), or is the label itself where that is a string, or,
    where labels are bare integers, follows SNLI's order. Integers may be written as strings where `label_names` says
    what they mean. Names are lower-cased. Pairs that have no label (-1, "-", "", null) or no text on one side are
    dropped and counted.

    Args:
        source, split, cache_dir: as `idrm.sources.load_records` has them.
        label_names: what the integers 0, 1, ... mean where the data does not say, and the labels' order.
        labels: the labels to come out with, in order: those of a model or of other data, matched by name. None: the
            data's own, in the order of `label_names`, of its features, or of NLI_LABELS.

    Returns:
        (dataset, labels, report): the dataset has the columns premise, hypothesis (string) and label (int64), the
        position of its name in labels.

    Raises:
        InputError: as of `load_records`; a record with other keys or types, or a label without a name (named by its
            number); labels that are not two or three with "entailment" among them, or not among `labels`; no pair left.
    """
    records = load_records(source, split=split, cache_dir=cache_dir)
    premise, hypothesis, label = _keys(source, records)
    naming = _Naming.of(source, records.features[label], label_names)

    def convert(record: dict) -> tuple[dict, str]:
        sides = {"premise": record[premise], "hypothesis": record[hypothesis]}
        for key, text in zip((premise, hypothesis), sides.values(), strict=True):
            if not isinstance(text, str):
                raise InputError(f"expected a string as {key!r}, found {type(text).__name__}")
        name = _label_name(record[label], naming.names, label)
        empty = not all(text.strip() for text in sides.values())
        return {**sides, "label": name}, "no_label" if name is None else "empty_text" if empty else ""

    pairs, dropped = convert_records(records, source, convert, _FEATURES)
    if not len(pairs):
        raise InputError(f"no pair can be used ({NliReport(source, len(records), 0, dropped).summary()})")
    found = pairs["label"][:]
    own = naming.order or _ordered(set(found))
    if labels is None:
        require_nli_labels(source, own)
        labels = own
    elif not set(found) <= set(labels):
        strange = sorted(set(found) - set(labels))
        raise InputError(f"{source}: label {strange[0]!r} is none of {', '.join(labels)}")
    counts = Counter(found)
    report = NliReport(
        source, len(records), len(pairs), dropped, {name: counts[name] for name in labels}, naming.assumed
    )
    position = {name: index for index, name in enumerate(labels)}
    pairs = pairs.remove_columns("label")
    pairs = pairs.add_column("label", [position[name] for name in found], feature=Value("int64"))
    return pairs, tuple(labels), report


def load_all_nli(
    sources: Sequence[str],
    *,
    split: str = "train",
    label_names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Dataset, tuple[str, ...], list[NliReport]]:
    """Load several sources as one data set (`load_nli`), one after another, their labels matched by name.

    The labels come out in the order of the first source. Raises InputError where another has a label that it lacks.
    """
    parts, reports = [], []
    for source in sources:
        pairs, labels, report = load_nli(
            source, split=split, label_names=label_names, labels=labels, cache_dir=cache_dir
        )
        parts.append(pairs)
        reports.append(report)
    return concatenate_datasets(parts), tuple(labels), reports


def reorder_labels(pairs: Dataset, labels: Sequence[str], order: Sequence[str]) -> Dataset:
    """The same pairs with their labels counted in another order of the same names."""
    position = [order.index(label) for label in labels]
    column = [position[label] for label in pairs["label"][:]]
    return pairs.remove_columns("label").add_column("label", column, feature=Value("int64"))


def require_nli_labels(whose: str, labels: Sequence[str]) -> None:
    """Refuses labels that are not those of NLI: two or three, one of them "entailment"."""
    if len(labels) not in (2, 3) or "entailment" not in labels or len(set(labels)) < len(labels):
        raise InputError(
            f"{whose}: expected two or three labels with 'entailment' among them, found "
            + (", ".join(repr(label) for label in labels[:5]) or "none")
        )


def _keys(source: str, records: Dataset) -> tuple[str, str, str]:
    for keys in _KEYS:
        if set(keys) <= set(records.column_names):
            return keys
    expected = ", or ".join(", ".join(keys) for keys in _KEYS)
    raise InputError(f"{source}: record 1: expected the keys {expected}; found {', '.join(records.column_names)}")


@dataclass(frozen=True)
class _Naming:
    """What the labels of one source are called.

    Attributes:
        names: of the integers 0, 1, ...; also the strings that are legal, None where any is.
        order: of the labels that come out; None where only the data's strings tell it.
        assumed: nobody gave the names.
    """

    names: tuple[str, ...] | None
    order: tuple[str, ...] | None
    assumed: bool = False

    @classmethod
    def of(cls, source: str, feature: Any, label_names: Sequence[str] | None) -> "_Naming":
        given = tuple(name.lower() for name in label_names) if label_names else None
        if isinstance(feature, ClassLabel):
            names = tuple(name.lower() for name in feature.names)
            if given is not None and len(given) != len(names):
                raise InputError(f"{source}: --label_names has {len(given)} names for the labels {', '.join(names)}")
            same = given is None or set(given) == set(names)
            return cls(names if same else given, given or names)
        if given is not None or getattr(feature, "dtype", None) in ("string", "large_string"):
            return cls(given, given)
        return cls(NLI_LABELS, NLI_LABELS, assumed=True)


def _label_name(value: Any, names: Sequence[str] | None, key: str) -> str | None:
    """The name of one label, None where there is none."""
    if isinstance(value, str):
        name = value.strip().lower()
        if re.fullmatch(r"-?\d+", name):
            if names is None and name != "-1":
                raise InputError(f"expected a name as {key!r}, found {value!r:.80}: give --label_names for integers")
            return _label_name(int(name), names, key)
        if name in ("", "-"):
            return None
        if names is not None and name not in names:
            raise InputError(f"expected one of {', '.join(names)} as {key!r}, found {value!r:.80}")
        return name
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(names or ()):
        last = len(names or NLI_LABELS) - 1
        raise InputError(f"expected an integer from 0 to {last}, or a name, as {key!r}, found {value!r:.80}")
    return names[value]


def _ordered(names: set[str]) -> tuple[str, ...]:
    """NLI's own labels in their usual order, then any others by name."""
    return tuple(name for name in NLI_LABELS if name in names) + tuple(sorted(names - set(NLI_LABELS)))
