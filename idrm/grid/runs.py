"""Training runs as processes, several at a time: each is trained once, and goes on where it was interrupted."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from idrm.arguments import RunConfiguration, parse_arguments
from idrm.child_processes import REPOSITORY, Crew
from idrm.command_line import RUN_FILE, flag_tokens
from idrm.errors import InputError
from idrm.processes import termination_as_exit
from idrm.run_folder import read_run_file

logger = logging.getLogger(__name__)

TRAIN_SCRIPT = REPOSITORY / "idrm" / "train.py"
# Of a run that has begun: where it lies, on what it runs, and what no weight depends on.
_FREE_TO_DIFFER = frozenset(
    ("output_dir", "use_cpu", "disable_tqdm", *RunConfiguration.free_to_change, *RunConfiguration.free_to_move)
)


@dataclass(frozen=True, eq=False)
class Run:
    """One training run of a grid.

    Attributes:
        row: the name of the row of the table that it belongs to.
        seed: of this run.
        folder: its output folder.
        flags: of `idrm train`, those for seed and output folder aside.
    """

    row: str
    seed: int
    folder: Path
    flags: Mapping[str, Any]

    @property
    def tokens(self) -> list[str]:
        """Its command line, without the program."""
        return flag_tokens({**self.flags, "seed": self.seed, "output_dir": self.folder})

    @property
    def is_finished(self) -> bool:
        """Whether its model is whole: metrics are written after that."""
        return (self.folder / "all_results.json").is_file() and (self.folder / "config.json").is_file()


class RunFailed(RuntimeError):
    """A run's process ended with a status other than 0, which is `status`."""

    def __init__(self, run: Run, status: int, log: Path):
        super().__init__(f"the run {run.folder} failed with exit status {status}; its log is {log}")
        self.status = status
        self.log = log


def require_runnable(runs: Sequence[Run]) -> None:
    """Parses every run's flags, and holds those of a run that has begun against what its folder says.

    Raises:
        InputError: flags that `idrm train` refuses, or a folder that holds another run.
    """
    for run in runs:
        try:
            config = parse_arguments(run.tokens)
        except InputError as error:
            raise InputError(f"row {run.row!r}: {error}") from error
        path = run.folder / RUN_FILE
        if not path.exists():
            continue
        before = read_run_file(path, config)
        now = yaml.safe_load(yaml.safe_dump(config.recorded))
        for name in sorted((before.keys() | now.keys()) - _FREE_TO_DIFFER):
            if before.get(name) != now.get(name):
                was, wanted = (repr(values.get(name, "not given")) for values in (before, now))
                raise InputError(f"{run.folder}: holds another run, with {name} {was} and not {wanted}")


def train_runs(
    runs: Sequence[Run],
    *,
    log_folder: Path,
    launcher: Sequence[str] = (sys.executable,),
    jobs: int = 1,
    inherited: Sequence[int] = (),
) -> None:
    """Trains what is not finished, `jobs` at a time; says what begins and ends.

    Args:
        runs: as `require_runnable` accepts them; they begin in this order.
        log_folder: receives what each run prints.
        launcher: the program and arguments that start `idrm/train.py`.
        jobs: processes at a time. With several, each is given its share of this machine's cores.
        inherited: file descriptors that they share, such as that of `idrm.run_folder.sole_use`.

    Raises:
        RunFailed: with the first that fails; those still running are ended, and go on at the next call. So they are at
            an interruption and at SIGTERM.
    """
    waiting = [run for run in runs if not run.is_finished]
    if len(waiting) < len(runs):
        logger.info("%d of %d runs are trained already.", len(runs) - len(waiting), len(runs))
    if not waiting:
        return
    crew = Crew(jobs, inherited)
    training = _Training(len(waiting), log_folder, launcher, crew)
    with termination_as_exit(), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(training.train, run) for run in waiting]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            crew.stop()
            raise


class _Training:
    """What is done with each run; may be called from several threads."""

    def __init__(self, count: int, log_folder: Path, launcher: Sequence[str], crew: Crew):
        self.count = count
        self.log_folder = log_folder
        self.launcher = launcher
        self.crew = crew
        self._lock = threading.Lock()
        self._finished = 0
        self._started_at = time.monotonic()

    def train(self, run: Run) -> None:
        log = self.log_folder / ("-".join(run.folder.parts[-3:]) + ".log")
        # A run that has begun goes on from its last checkpoint, or from its first step where it has none.
        resume = ["--resume_from_checkpoint=true"] if (run.folder / RUN_FILE).exists() else []
        status = self.crew.run([*self.launcher, str(TRAIN_SCRIPT), *run.tokens, *resume], log)
        if status is None:
            return
        if status:
            raise RunFailed(run, status, log)
        with self._lock:
            self._finished += 1
            left = (time.monotonic() - self._started_at) / self._finished * (self.count - self._finished)
            logger.info(
                "%d of %d trained: %s, seed %d (%s); about %.0f min left",
                self._finished,
                self.count,
                run.row,
                run.seed,
                run.folder,
                left / 60,
            )


def last_training_record(run: Run, name: str) -> float | None:
    """The last value of a metric in a finished run's training log, None where it never had one."""
    state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    return next((record[name] for record in reversed(state["log_history"]) if name in record), None)
