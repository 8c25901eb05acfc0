"""Records from the hub, a file or a folder, whatever they are records of, and their conversion."""

import bz2
import gzip
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, config, load_dataset, load_from_disk

from idrm.errors import InputError

# Otherwise `datasets` counts loads at a server, even of local files: nothing is sent where nothing remote is named.
config.HF_UPDATE_DOWNLOAD_COUNTS = False

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _suffix(path: Path) -> str:
    """The suffix that tells the format, without the one of a compression."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix


def load_records(source: str, *, split: str = "train", cache_dir: str | os.PathLike | None = None) -> Dataset:
    """The records of one source, as they are.

    Args:
        source: a .jsonl, .json or .parquet file (the first two possibly compressed), a folder of such files or one
            written by `Dataset.save_to_disk`, or a dataset's name on the hub, with one of its configurations as
            name:configuration. What looks like a path (one of these suffixes, or a beginning of ".", "/" or "~") is
            never looked up on the hub.
        split: split to load; of a single file, which is one split, only a slice ("train[:100]") matters.
        cache_dir: where `datasets` keeps its tables; its own default if None.

    Raises:
        InputError: the source does not exist, cannot be loaded or is empty, or JSON is malformed (named by file and
            line).
    """
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
        elif path.is_dir():
            records = load_dataset(str(path), split=split, cache_dir=cache_dir)
        else:
            name, _, configuration = source.partition(":")
            records = load_dataset(name, configuration or None, split=split, cache_dir=cache_dir)
    except Exception as error:
        # datasets has no error class of its own for bad data: whatever it raises, only the input can have caused.
        for file in _json_files(path):
            _check_json(file)
        raise InputError(f"{source}: cannot be loaded: {_root_cause(error)}") from error
    if len(records) == 0:
        raise InputError(f"{source}: split {split!r} holds no records")
    return records


def convert_records(
    records: Dataset, source: str, convert: Callable[[dict], tuple[dict, str]], features: Features
) -> tuple[Dataset, dict[str, int]]:
    """Converts every record, and leaves out those that there is a reason to drop.

    Args:
        records: as ``load_records`` gives those of `source`.
        convert: from a record to the new one and the reason to drop it, "" to keep it.
        features: of the new ones.

    Returns:
        (dataset, dropped): the records kept, and how many were dropped for which reason.

    Raises:
        InputError: what `convert` raises, with the record's number; a record that is not UTF-8.
    """

    def numbered(record: dict, index: int) -> dict:
        try:
            converted, reason = convert(record)
        except InputError as error:
            raise InputError(f"{source}: record {index + 1}: {error}") from None
        except UnicodeDecodeError as error:  # tables hold bytes, decoded when a record is read
            raise InputError(f"{source}: record {index + 1}: not UTF-8: {error.reason}") from None
        return {**converted, "drop_reason": reason}

    # Converted afresh in every run: a cached table would outlive a change to the conversion.
    converted = records.map(
        numbered,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features({**features, "drop_reason": Value("string")}),
        load_from_cache_file=False,
        desc=f"Reading {source}",
    )
    reasons = converted["drop_reason"][:]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    dropped = dict(sorted(Counter(reason for reason in reasons if reason).items()))
    converted = converted.remove_columns("drop_reason")
    return (converted.select(kept) if dropped else converted), dropped


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
