"""A pipeline's steps as processes: each once, as soon as what it needs is there, and never with other flags."""

from __future__ import annotations

import glob
import json
import logging
import os
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

from idrm.child_processes import SECONDS_TO_END, Crew
from idrm.command_line import RUN_FILE, flag_tokens
from idrm.errors import InputError
from idrm.grid.runs import Run
from idrm.pipeline.commands import grid_runs
from idrm.pipeline.specification import Pipeline, Step
from idrm.processes import termination_as_exit
from idrm.run_folder import write_whole
from idrm.yaml_files import filled

logger = logging.getLogger(__name__)

FINISHED_FILE = "finished_steps.json"


class StepFailed(RuntimeError):
    """A step's process ended with a status other than 0, which is `status`."""

    def __init__(self, step: Step, status: int, log: Path):
        super().__init__(f"the step {step.name} failed with exit status {status}; its log is {log}")
        self.status = status
        self.log = log


@dataclass(frozen=True)
class Place:
    """Where a pipeline runs, and what its trainings are given.

    Attributes:
        folder: of everything that comes out.
        launcher: the program and arguments that start a training's script.
        training: tokens that every training gets behind its own.
    """

    folder: Path
    launcher: Sequence[str]
    training: Sequence[str]

    def output(self, step: Step) -> Path:
        return self.folder / step.location

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.log"

    def tokens(self, step: Step, names: Mapping[str, str]) -> list[str]:
        """What stands behind the step's program; `names` are what the names in braces stand for."""
        inputs, flags, training = (filled(part, names, step.name) for part in (step.inputs, step.flags, step.training))
        literal = {name: glob.escape(value) for name, value in names.items()}
        patterns = filled(step.inputs, literal, step.name)
        tokens = [
            path
            for text, pattern in zip(inputs, patterns, strict=True)
            for path in sorted(glob.glob(pattern)) or [text]
        ]
        if step.config is not None:
            tokens.append(f"--config={step.config}")
        tokens += flag_tokens({**flags, step.command.output_flag: self.output(step)})
        if step.command.writes_file:
            # One that is there is of an interruption, before the step was noted as finished.
            tokens.append("--overwrite=true")
        if step.command.is_training:
            tokens += self.training
        if step.command.is_grid:
            tokens += [f"--launcher={shlex.join(self.launcher)}", "--", *flag_tokens(training), *self.training]
        return tokens

    def description(self, step: Step, pipeline: Pipeline) -> dict[str, Any]:
        """What a step is, whatever folder it runs in and whoever starts it: kept with it, to tell another one."""
        names = {**pipeline.values, **{earlier.name: f"{{{earlier.name}}}" for earlier in pipeline.steps}}
        if pipeline.embedded_judge is not None:
            names[pipeline.embedded_judge] = f"{{{pipeline.embedded_judge}}}"
        parts = {"inputs": step.inputs, "flags": step.flags, "training": step.training}
        return {
            "command": step.kind,
            # The files are known by what they say.
            **{
                key: filled(part, names, step.name)
                for key, part in parts.items()
                if key != "inputs" or not step.command.is_grid
            },
            "files": [blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in step.files],
            "behind --": list(self.training) if step.command.is_training or step.command.is_grid else [],
        }


def require_runnable(pipeline: Pipeline, place: Place) -> None:
    """Parses every step's flags as its command will, and holds finished steps against what the file says now.

    Raises:
        InputError: flags that a command refuses, a file that is not there, a run that no row of a grid makes, or a
            folder that holds another pipeline.
    """
    names = names_of(pipeline, place, "http://localhost")
    finished = read_finished(place.folder)
    runs: dict[str, list[Run]] = {}
    for step in pipeline.steps:
        for path in step.files:
            if not path.is_file():
                raise InputError(f"step {step.name}: {path}: no such file")
        for text in step.texts:
            _require_run(step, text, runs, names)
        tokens = place.tokens(step, names)
        if step.name in finished:
            before = finished[step.name]["step"]
            now = json.loads(json.dumps(place.description(step, pipeline)))
            if before != now:
                part = next(key for key in now if before.get(key) != now[key])
                raise InputError(
                    f"--output_dir {place.folder}: step {step.name} was run with other {part}; give another folder"
                )
        try:
            # A finished grid may have been moved, with the folder that its runs name.
            if step.name not in finished:
                step.command.check(tokens)
            if step.command.is_grid:
                runs[step.name] = grid_runs(tokens)
        except InputError as error:
            raise InputError(f"step {step.name}: {error}") from error


def _require_run(step: Step, text: str, runs: Mapping[str, Sequence[Run]], names: Mapping[str, str]) -> None:
    """Refuses {grid}/runs/... where that grid trains nothing in such a folder."""
    for grid, of_grid in runs.items():
        if text.startswith(f"{{{grid}}}/runs/"):
            wanted = filled(text, {name: glob.escape(value) for name, value in names.items()}, step.name)
            if not any(fnmatch(str(run.folder), wanted) for run in of_grid):
                made = ", ".join(sorted({str(run.folder.relative_to(run.folder.parents[2])) for run in of_grid})[:3])
                raise InputError(f"step {step.name}: {text}: {grid} makes no such run; it makes {made} ...")


def names_of(pipeline: Pipeline, place: Place, judge: str | None) -> dict[str, str]:
    """What every name in braces stands for; `judge` is the embedded judge's address."""
    names = {**pipeline.values, **{step.name: str(place.output(step)) for step in pipeline.steps}}
    if pipeline.embedded_judge is not None:
        names[pipeline.embedded_judge] = judge
    return names


def read_finished(folder: Path) -> dict[str, Any]:
    """Of every step that is finished, what it was (`step`) and how long it took (`seconds`).

    Raises:
        InputError: the file is not one that a pipeline wrote.
    """
    path = folder / FINISHED_FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(entry["step"] and entry["seconds"] >= 0 for entry in content.values()):
            return content
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        pass
    raise InputError(f"{path}: cannot be read; give another folder")


def run_steps(
    pipeline: Pipeline, place: Place, *, judge: str | None, jobs: int = 1, inherited: Sequence[int] = ()
) -> None:
    """Runs what is not finished, `jobs` at a time, each as soon as the steps that it names are.

    Args:
        judge: the embedded judge's address.
        inherited: file descriptors that the processes share, such as that of `idrm.run_folder.sole_use`.

    Raises:
        StepFailed: with the first that fails; those still running are ended, and go on at the next call. So they are at
            an interruption and at SIGTERM.
    """
    # A grid ends its own runs first.
    crew = _Crew(pipeline, place, names_of(pipeline, place, judge), Crew(jobs, inherited, 2 * SECONDS_TO_END))
    waiting = [step for step in pipeline.steps if step.name not in crew.finished]
    if len(waiting) < len(pipeline.steps):
        logger.info("%d of %d steps are finished already.", len(pipeline.steps) - len(waiting), len(pipeline.steps))
    running: set[Future] = set()
    with termination_as_exit(), ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                ready = [step for step in waiting if crew.has_what_it_needs(step)][: jobs - len(running)]
                waiting = [step for step in waiting if step not in ready]
                running |= {pool.submit(crew.run, step) for step in ready}
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            crew.processes.stop()
            raise


class _Crew:
    """What is done with each step; may be called from several threads."""

    def __init__(self, pipeline: Pipeline, place: Place, names: Mapping[str, str], processes: Crew):
        self.pipeline = pipeline
        self.place = place
        self.names = names
        self.processes = processes
        self.finished = read_finished(place.folder)
        self._lock = threading.Lock()

    def has_what_it_needs(self, step: Step) -> bool:
        steps = {other.name for other in self.pipeline.steps}
        return all(name in self.finished for name in step.placeholders if name in steps)

    def run(self, step: Step) -> None:
        output = self.place.output(step)
        resumes: list[str] = []
        if not step.command.goes_on and output.is_dir():
            shutil.rmtree(output)
        elif step.command.is_training and (output / RUN_FILE).exists():
            resumes = ["--resume_from_checkpoint=true"]
        output.parent.mkdir(parents=True, exist_ok=True)
        log = self.place.log(step)
        number = self.pipeline.steps.index(step) + 1
        logger.info(
            "step %d of %d: %s (its log: %s)", number, len(self.pipeline.steps), step.name, os.path.relpath(log)
        )
        started = time.monotonic()
        command = [*step.command.start(self.place.launcher), *self.place.tokens(step, self.names), *resumes]
        status = self.processes.run(command, log)
        if status is None:
            return
        if status:
            raise StepFailed(step, status, log)
        seconds = time.monotonic() - started
        description = self.place.description(step, self.pipeline)
        with self._lock:
            self.finished[step.name] = {"step": description, "seconds": seconds}
            write_whole(self.place.folder / FINISHED_FILE, json.dumps(self.finished, indent=2) + "\n")
            logger.info(
                "%d of %d finished: %s, %.0f s", len(self.finished), len(self.pipeline.steps), step.name, seconds
            )
