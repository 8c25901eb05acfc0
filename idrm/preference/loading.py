"""Preference data from the hub, a file or a folder: every record is converted, and every dropped pair is counted."""

import bz2
import gzip
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, config, load_dataset, load_from_disk

from idrm.errors import InputError
from idrm.preference.formats import convert_record, drop_reason

# Otherwise `datasets` counts loads at a server, even of local files: nothing is sent where nothing remote is named.
config.HF_UPDATE_DOWNLOAD_COUNTS = False

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_FEATURES = Features(
    {
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "conversational": Value("bool"),
        "margin": Value("float64"),
        "drop_reason": Value("string"),
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
    source: str, *, split: str = "train", cache_dir: str | os.PathLike | None = None
) -> tuple[Dataset, PreferenceReport]:
    """Load preference pairs and convert each of them to messages (`formats.convert_record`).

    Args:
        source: a .jsonl, .json or .parquet file (the first two possibly compressed), a folder of such files or one
            written by `Dataset.save_to_disk`, or a dataset's name on the hub. What looks like a path (one of these
            suffixes, or a beginning of ".", "/" or "~") is never looked up on the hub.
        split: split to load; of a single file, which is one split, only a slice ("train[:100]") matters.
        cache_dir: where `datasets` keeps its tables; its own default if None.

    Returns:
        (dataset, report): the dataset has the columns chosen and rejected (lists of {"role", "content"}),
        conversational (bool) and margin (float or None), without the pairs that `formats.drop_reason` names.

    Raises:
        InputError: the source does not exist or is empty, JSON is malformed (named by file and line), a record lacks
            keys or holds other types than expected (named by its number), or no pair is left.
    """
    records = _load_records(source, split, cache_dir)

    def convert(record: dict, index: int) -> dict:
        try:
            pair = convert_record(record)
        except InputError as error:
            raise InputError(f"{source}: record {index + 1}: {error}") from None
        except UnicodeDecodeError as error:  # tables hold bytes, decoded when a record is read
            raise InputError(f"{source}: record {index + 1}: not UTF-8: {error.reason}") from None
        return {**pair, "drop_reason": drop_reason(pair) or ""}

    # Converted afresh in every run: a cached table would outlive a change to the conversion.
    pairs = records.map(
        convert,
        with_indices=True,
        remove_columns=records.column_names,
        features=_FEATURES,
        load_from_cache_file=False,
        desc=f"Reading {source}",
    )
    reasons = pairs["drop_reason"][:]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    dropped = dict(sorted(Counter(reason for reason in reasons if reason).items()))
    report = PreferenceReport(source, read=len(reasons), kept=len(kept), dropped=dropped)
    if not kept:
        raise InputError(f"no pair can be used ({report.summary()})")
    pairs = pairs.remove_columns("drop_reason")
    return (pairs.select(kept) if dropped else pairs), report


def _suffix(path: Path) -> str:
    """The suffix that tells the format, without the one of a compression."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix


def _load_records(source: str, split: str, cache_dir: str | os.PathLike | None) -> Dataset:
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or _suffix(path) in _BUILDERS
    if looks_local and not path.exists():
        raise InputError(f"{source}: no such file or folder")
    if path.is_file() and _suffix(path) not in _BUILDERS:
        raise InputError(f"{source}: expected a file of type {', '.join(_BUILDERS)}, possibly compressed, or a folder")
    try:
        if path.is_file():
            name = re.match(r"\w*", split)[0]
            records = load_dataset(
                _BUILDERS[_suffix(path)], data_files={name: str(path)}, split=split, cache_dir=cache_dir
            )
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            records = load_from_disk(str(path))
            records = records[split] if isinstance(records, DatasetDict) else records
        else:
            records = load_dataset(str(path) if path.is_dir() else source, split=split, cache_dir=cache_dir)
    except Exception as error:
        # datasets has no error class of its own for bad data: whatever it raises, only the input can have caused.
        for file in _json_files(path):
            _check_json(file)
        raise InputError(f"{source}: cannot be loaded: {_root_cause(error)}") from error
    if len(records) == 0:
        raise InputError(f"{source}: split {split!r} holds no records")
    return records


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _json_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and _BUILDERS.get(_suffix(file)) == "json"]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, OSError, ValueError, lzma.LZMAError) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _check_json(path: Path) -> None:
    """Name the first line of a JSON or JSON Lines file that is malformed; silent if there is none."""
    first, empty = "", True
    lines = []
    for number, line in _lines(path):
        lines.append(line)
        first = first or line.strip()[:1]
        empty = empty and not line.strip()
        if first == "{" and line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: malformed JSON: {error.msg} (column {error.colno})") from None
            _check_value(value, path, number)
    if empty:
        raise InputError(f"{path}: the file is empty")
    if first != "{":
        try:
            json.loads("".join(lines))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None


def _check_value(value: object, path: Path, number: int) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}:{number}: malformed JSON: {error.reason}") from None
