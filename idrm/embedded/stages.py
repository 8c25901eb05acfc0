"""The demonstration's stages: ordinary commands, each a fresh process on every rank, done once and then skipped."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from idrm.arguments import InteractionArguments
from idrm.command_line import flag_tokens
from idrm.embedded.generator import CUE_SHARE_OF_SPLIT
from idrm.errors import InputError

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
FINISHED_FILE = "finished_stages.json"
TEACHER_METRICS_FILE = "nli_results.json"
# Of the training pairs, evaluated like the other splits.
TRAIN_SAMPLE = "train_sample"
EVALUATED_SPLITS = ("train", *[split for split in CUE_SHARE_OF_SPLIT if split != "train"])

RECIPE = REPOSITORY / "recipes" / "embedded.yaml"
_INTERACTION_FLAGS = frozenset(entry.name for entry in fields(InteractionArguments))
_LAYER_FLAGS = frozenset(("student_layers", "teacher_layers", "top_blocks"))
# Given to the demonstration as a whole: each stage has its own, or none.
_NOT_PASSED_ON = frozenset(
    ("config", "local_rank", "output_dir", "seed", "resume_from_checkpoint", "embedded_seeds", "embedded_control")
)


@dataclass(frozen=True)
class Stage:
    """One command: its `name`, the `title` that is printed, and `command`, made when the stage's turn comes."""

    name: str
    title: str
    command: Callable[[], list[str]]


class StageFailed(RuntimeError):
    """A stage's process ended with a status other than 0, which is `status`."""

    def __init__(self, stage: Stage, status: int):
        super().__init__(f"the stage {stage.name} failed with exit status {status}")
        self.status = status


def teacher_command(run_folder: Path, seed: int) -> list[str]:
    folders = ["--data_folder", str(run_folder / "data"), "--output_dir", str(run_folder / "teacher")]
    return [sys.executable, "-m", "idrm.embedded.teacher", *folders, "--seed", str(seed)]


def recipe() -> dict[str, Any]:
    """What the students' commands say where the user does not; the batch size is that of all ranks together.

    Raises:
        InputError: this is no checkout, where the recipes lie beside the package.
    """
    try:
        return yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{RECIPE}: cannot be read; the demonstration needs a checkout of the project") from error


def student_command(
    run_folder: Path, name: str, seed: int, given: dict[str, Any], stage_flags: dict[str, Any]
) -> list[str]:
    """The ordinary training command of one student.

    `given` are the user's own arguments, which go before the demonstration's; `stage_flags` are what makes the stage,
    and go before the user's: alpha 0 for Bradley-Terry alone.
    """
    output_dir = run_folder / name
    files = {split: run_folder / "data" / f"{split}.jsonl" for split in EVALUATED_SPLITS}
    files["train"] = run_folder / "data" / f"{TRAIN_SAMPLE}.jsonl"
    flags = recipe()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags["per_device_train_batch_size"] = max(1, flags["per_device_train_batch_size"] // world_size)
    distils = stage_flags.get("alpha") != 0
    left_out = (
        _LAYER_FLAGS if distils and given.keys() & _LAYER_FLAGS else frozenset() if distils else _INTERACTION_FLAGS
    )
    flags = {flag: value for flag, value in flags.items() if flag not in left_out}
    if distils:
        flags["teacher_name_or_path"] = run_folder / "teacher"
    flags |= {flag: value for flag, value in given.items() if flag not in _NOT_PASSED_ON}
    flags |= {
        **stage_flags,
        "model_name_or_path": run_folder / "student",
        "dataset_name": run_folder / "data" / "train.jsonl",
        "eval_dataset_name": [f"{split}={path}" for split, path in files.items()],
        "output_dir": output_dir,
        "seed": seed,
    }
    if (output_dir / "run.yaml").exists():
        flags["resume_from_checkpoint"] = "true"
    return [sys.executable, str(REPOSITORY / "idrm" / "train.py"), *flag_tokens(flags)]


def run_stages(run_folder: Path, stages: list[Stage]) -> dict[str, float]:
    """Runs what is not finished yet, in order; every rank calls it with the same stages.

    Returns:
        The seconds that each finished stage took, by name; also in FINISHED_FILE, which the first rank writes.

    Raises:
        StageFailed: with the first stage that fails.
    """
    seconds = finished_stages(run_folder)
    for index, stage in enumerate(stages):
        if stage.name in seconds:
            logger.info("\n=== %s: finished before, skipped", stage.title)
            continue
        logger.info("\n=== %s", stage.title)
        command = stage.command()
        logger.info("%s\n", shlex.join(command))
        started = time.monotonic()
        status = subprocess.run(command, env=_environment(index), check=False).returncode
        if status:
            raise StageFailed(stage, status)
        seconds[stage.name] = time.monotonic() - started
        if is_first_rank():
            write_atomically(run_folder / FINISHED_FILE, json.dumps(seconds, indent=2))
    return seconds


def finished_stages(run_folder: Path) -> dict[str, float]:
    path = run_folder / FINISHED_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _environment(stage_index: int) -> dict[str, str]:
    """This rank's environment for a stage: with several ranks, a port of the stage's own.

    A rank may start a stage while another still leaves the one before: on the same port it would join that one.
    """
    environment = {**os.environ}
    # Threads that spin while they wait make small operations hundreds of times slower where cores are shared.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        environment["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + stage_index)
        # torchrun's own store listens on the launcher's port alone.
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    return environment
