"""The embedded demonstration from flags to table: data, teacher, Bradley-Terry, Id-RM, one after another."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from idrm.arguments import RunConfiguration
from idrm.embedded.generator import Sizes
from idrm.embedded.materials import write_data_and_student
from idrm.embedded.report import print_report
from idrm.embedded.stages import (
    Stage,
    StageFailed,
    is_first_rank,
    recipe,
    run_stages,
    student_command,
    teacher_command,
    write_atomically,
)
from idrm.errors import InputError

logger = logging.getLogger(__name__)

DEMONSTRATION_FILE = "demonstration.json"
# Given anew with each launch: none of them changes what comes out.
_FREE_TO_CHANGE = ("config", "local_rank", "output_dir", "resume_from_checkpoint", "disable_tqdm")

INTRODUCTION = """\
No model and no data were named: this is the embedded demonstration. A tiny encoder learns NLI, then a tiny decoder
becomes a reward model twice, by Bradley-Terry alone and with interaction distillation from that encoder. All data is
generated, nothing is downloaded, and its numbers say nothing about real models. To train one of those:

    --model_name_or_path MODEL --teacher_name_or_path NLI_ENCODER --dataset_name PAIRS   (folders, files or hub names)

Output: {folder}"""


def run(config: RunConfiguration) -> None:
    """Runs what is not finished of the demonstration in the output folder, then prints the table.

    With several ranks, every rank calls it; each stage's processes find one another by the ranks' environment.

    Raises:
        InputError: the output folder holds something else, or this demonstration with other flags.
        SystemExit: a stage failed; its exit status is passed on.
    """
    folder = config.output_dir
    recipe()  # before the folder is claimed, in case there is none
    _claim(folder, config)
    logger.info(INTRODUCTION.format(folder=folder))
    first_seed = config.training["seed"]
    seeds = range(first_seed, first_seed + config.embedded.embedded_seeds)
    runs = {seed: folder if len(seeds) == 1 else folder / f"seed_{seed}" for seed in seeds}
    try:
        for seed, run_folder in runs.items():
            _run_seed(run_folder, seed, config)
    except StageFailed as failure:
        logger.error("%s; the same command goes on from there", failure)
        sys.exit(failure.status)
    if is_first_rank():
        print_report(folder, runs)


def _run_seed(run_folder: Path, seed: int, config: RunConfiguration) -> None:
    if is_first_rank():
        # In whatever stage comes next, the other ranks' processes wait for this rank's before they read files.
        write_data_and_student(run_folder, seed, Sizes())

    def student_stage(number: int, name: str, title: str, **flags: Any) -> Stage:
        return Stage(
            name,
            f"seed {seed}, stage {number} of {count}: {title}",
            lambda: student_command(run_folder, name, seed, config.given, flags),
        )

    count = 4 if config.embedded.embedded_control else 3
    stages = [
        Stage("teacher", f"seed {seed}, stage 1 of {count}: teacher, NLI", lambda: teacher_command(run_folder, seed)),
        student_stage(2, "bt", "student, Bradley-Terry alone", alpha=0),
        student_stage(3, "idrm", "student, interaction distillation"),
    ]
    if config.embedded.embedded_control:
        stages.append(student_stage(4, "control", "student, control with uniform maps", teacher_control="uniform"))
    run_stages(run_folder, stages)


def _claim(folder: Path, config: RunConfiguration) -> None:
    """Makes the folder this demonstration's, or finds that it is already."""
    flags = {name: value for name, value in sorted(config.given.items()) if name not in _FREE_TO_CHANGE}
    path = folder / DEMONSTRATION_FILE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in before.keys() | flags.keys() if before.get(name) != flags.get(name))
        if changed:
            name = changed[0]
            raise InputError(
                f"--output_dir {folder}: holds this demonstration with {name} {before.get(name, 'not given')!r} and "
                f"not {flags.get(name, 'not given')!r}; give another folder"
            )
    elif folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"--output_dir {folder}: holds something else; give another folder")
    elif is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(flags, indent=2))
