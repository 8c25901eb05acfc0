"""What a study's runs need: folds, untrained students, the tuned teacher. Made once, then found again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from idrm.errors import InputError
from idrm.preference.formats import WITHOUT_MARGINS, convert_record
from idrm.processes import termination_as_exit
from idrm.run_folder import write_whole
from idrm.sources import load_records
from idrm.study.folds import divide_by_prompt
from idrm.study.recipe import Recipe
from idrm.untrained_student import save_untrained

logger = logging.getLogger(__name__)

TEACHER_SCRIPT = Path(__file__).resolve().parents[1] / "teacher.py"


@dataclass(frozen=True)
class Places:
    """Where a study's files lie."""

    folder: Path

    @property
    def tuned_teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def teacher_cache(self) -> Path:
        return self.folder / "teacher_cache"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def fold(self, fold: int) -> Path:
        """Of its train.jsonl and test.jsonl."""
        return self.folder / "folds" / f"fold_{fold}"

    def student(self, seed: int) -> Path:
        return self.folder / "students" / f"seed_{seed}"

    def runs(self, fold: int) -> Path:
        return self.folder / "runs" / f"fold_{fold}"

    def outcomes(self, fold: int) -> Path:
        return self.folder / "outcomes" / f"fold_{fold}"


def write_folds(records: Dataset, recipe: Recipe, places: Places) -> None:
    """Writes each fold's pairs as test.jsonl and all others as train.jsonl, where they are not there.

    Raises:
        InputError: a record that is no preference pair, too few prompts, or folds of other pairs in the folder.
    """
    pairs = []
    for number, record in enumerate(records, start=1):
        try:
            pairs.append(convert_record(record, WITHOUT_MARGINS))
        except InputError as error:
            raise InputError(f"record {number}: {error}") from None
    lines = [
        json.dumps({name: value for name, value in record.items() if value is not None}, ensure_ascii=False) + "\n"
        for record in records
    ]
    for fold, members in enumerate(divide_by_prompt(pairs, recipe.folds, recipe.fold_seed)):
        tested = set(members)
        parts = {
            "test": [line for index, line in enumerate(lines) if index in tested],
            "train": [line for index, line in enumerate(lines) if index not in tested],
        }
        for name, part in parts.items():
            path = places.fold(fold) / f"{name}.jsonl"
            text = "".join(part)
            if not path.exists():
                write_whole(path, text)
            elif path.read_text(encoding="utf-8") != text:
                raise InputError(f"{path}: holds other pairs than --dataset_name; give another --output_dir")


def save_students(records: Dataset, recipe: Recipe, places: Places) -> None:
    """Saves an untrained student for every seed, where it is not there."""
    missing = [seed for seed in recipe.seeds if not places.student(seed).exists()]
    if not missing:
        return
    texts = [_text(record[side]) for record in records for side in ("chosen", "rejected")]
    for seed in missing:
        places.student(seed).parent.mkdir(parents=True, exist_ok=True)
        save_untrained(places.student(seed), texts, seed, recipe.student)


def tune_teacher(recipe: Recipe, places: Places, flags: Mapping[str, Any]) -> None:
    """Fine-tunes the encoder by `idrm teacher`, where that has not been done; its output goes to the terminal.

    Raises:
        SystemExit: the process failed; its exit status is passed on.
    """
    folder = places.tuned_teacher
    if (folder / "config.json").exists():
        logger.info("The teacher in %s is there already.", folder)
        return
    unfinished = places.folder / "teacher-unfinished"
    command = [sys.executable, str(TEACHER_SCRIPT), "--config", str(recipe.teacher), "--output_dir", str(unfinished)]
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if (unfinished / "run.yaml").exists():
        command.append("--resume_from_checkpoint=true")
    logger.info("Fine-tuning the teacher on NLI.")
    with termination_as_exit():
        status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)
    for checkpoint in unfinished.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    os.replace(unfinished, folder)


def _text(side: Any) -> str:
    """All text of one side of a pair, for the tokenizer to learn from."""
    return side if isinstance(side, str) else "\n".join(message["content"] for message in side)


def read_pairs(source: str, split: str) -> Dataset:
    """The records of the study, as they are."""
    records = load_records(source, split=split)
    missing = {"chosen", "rejected"} - set(records.column_names)
    if missing:
        raise InputError(f"{source}: expected records with 'chosen' and 'rejected', which {sorted(missing)} lacks")
    return records
