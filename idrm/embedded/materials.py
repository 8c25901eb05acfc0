"""What the demonstration and tiny twins of recipes are made of; `python -m idrm.embedded.materials` makes all of it.

::

    data/*.jsonl    preference pairs of every split, NLI pairs, and train_sample.jsonl, the first of the training pairs
    student/        an untrained reward model
    policy/         an untrained language model with the student's tokenizer
    teacher/        a small encoder that has learnt the NLI pairs
    untaught/       one of the same shape and tokenizer, as it was drawn
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForCausalLM, set_seed

from idrm.command_line import FlagParser, fields_of, require_at_least
from idrm.embedded.generator import Sizes, read_data, write_data
from idrm.embedded.stages import TRAIN_SAMPLE
from idrm.embedded.teacher import Recipe, train_and_save
from idrm.errors import InputError
from idrm.processes import command
from idrm.run_folder import require_writable
from idrm.untrained_student import Size, save_untrained


@dataclass
class MaterialArguments:
    """Where all of it goes, and how much there is of it."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for data, student, policy and teacher."})
    seed: int = field(default=0, metadata={"help": "Of data and models."})
    train_pairs: int = field(default=Sizes.train, metadata={"help": "Preference pairs to train on."})
    evaluation_pairs: int = field(default=Sizes.evaluation, metadata={"help": "Preference pairs of every other split."})
    nli_pairs: int = field(default=Sizes.nli_train, metadata={"help": "NLI pairs that the teacher learns."})
    teacher_max_steps: int = field(default=Recipe.max_steps, metadata={"help": "Most steps that it takes."})


def write_data_and_student(folder: Path, seed: int, sizes: Sizes) -> None:
    """Writes data and untrained student, each where it is not there and whole or not at all."""
    data = folder / "data"
    if not data.exists():
        unfinished = folder / ".data-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_data(unfinished, seed, sizes)
        sample = (unfinished / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[: sizes.evaluation]
        (unfinished / f"{TRAIN_SAMPLE}.jsonl").write_text("".join(sample), encoding="utf-8")
        os.replace(unfinished, data)
    if not (folder / "student").exists():
        save_untrained(folder / "student", texts_of(folder), seed, Size())


def texts_of(folder: Path) -> list[str]:
    """All sequences of the training pairs, which tokenizers are learnt from."""
    return [text for pair in read_data(folder / "data" / "train.jsonl") for text in pair.values()]


def save_untaught(folder: Path, seed: int) -> None:
    """Saves an encoder of the teacher's shape that has learnt nothing, whole or not at all."""
    set_seed(seed)
    unfinished = folder / ".untaught-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    BertForSequenceClassification(BertConfig.from_pretrained(folder / "teacher")).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(unfinished)
    os.replace(unfinished, folder / "untaught")


def parse_arguments(argv: Sequence[str] | None = None) -> MaterialArguments:
    """The flags; raises InputError for an unknown one, or a value of the wrong kind."""
    values, _ = FlagParser((MaterialArguments,), "python -m idrm.embedded.materials").values(argv)
    if not values["output_dir"]:
        raise InputError("--output_dir is missing: give a folder")
    counts = ("train_pairs", "evaluation_pairs", "nli_pairs", "teacher_max_steps")
    require_at_least(values, {"seed": 0, **dict.fromkeys(counts, 1)})
    return MaterialArguments(**fields_of(MaterialArguments, values))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes what is missing of it."""
    with command():
        arguments = parse_arguments(argv)
        folder = Path(arguments.output_dir).expanduser()
        require_writable("--output_dir", folder)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = Sizes(arguments.train_pairs, arguments.evaluation_pairs, arguments.nli_pairs)
        write_data_and_student(folder, arguments.seed, sizes)
        if not (folder / "policy").exists():
            save_untrained(folder / "policy", texts_of(folder), arguments.seed, Size(), LlamaForCausalLM)
        if not (folder / "teacher").exists():
            recipe = Recipe(max_steps=arguments.teacher_max_steps)
            train_and_save(folder / "data", folder / "teacher", arguments.seed, recipe)
        if not (folder / "untaught").exists():
            save_untaught(folder, arguments.seed)


if __name__ == "__main__":
    main()
