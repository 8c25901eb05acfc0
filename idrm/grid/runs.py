"""Training runs as processes, several at a time: each is trained once, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
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
from idrm.command_line import RUN_FILE, flag_tokens
from idrm.errors import InputError
from idrm.processes import termination_as_exit
from idrm.run_folder import read_run_file

logger = logging.getLogger(__name__)

TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
# Of a run that has begun: where it lies, on what it runs, and what no weight depends on.
_FREE_TO_DIFFER = frozenset(
    ("output_dir", "use_cpu", "disable_tqdm", *RunConfiguration.free_to_change, *RunConfiguration.free_to_move)
)
_LINES_OF_A_FAILURE = 15
_SECONDS_TO_END = 20


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


def require_program(flag: str, launcher: Sequence[str]) -> None:
    """Raises InputError for a launcher that is not there to be started."""
    if not launcher or shutil.which(launcher[0]) is None:
        raise InputError(f"{flag} {shlex.join(launcher)}: expected a program that is installed, and its arguments")


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
    log_folder.mkdir(parents=True, exist_ok=True)
    crew = _Crew(len(waiting), log_folder, list(launcher), jobs, tuple(inherited))
    with termination_as_exit(), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(crew.train, run) for run in waiting]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            crew.stop()
            raise


class _Crew:
    """The processes at work; every method may be called from several threads."""

    def __init__(self, count: int, log_folder: Path, launcher: list[str], jobs: int, inherited: tuple[int, ...]):
        self.count = count
        self.log_folder = log_folder
        self.launcher = launcher
        self.jobs = jobs
        self.inherited = inherited
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._finished = 0
        self._started_at = time.monotonic()

    def train(self, run: Run) -> None:
        log = self.log_folder / ("-".join(run.folder.parts[-3:]) + ".log")
        # A run that has begun goes on from its last checkpoint, or from its first step where it has none.
        resume = ["--resume_from_checkpoint=true"] if (run.folder / RUN_FILE).exists() else []
        command = [*self.launcher, str(TRAIN_SCRIPT), *run.tokens, *resume]
        with log.open("w", encoding="utf-8") as output:
            print(shlex.join(command), file=output, flush=True)
            with self._lock:
                if self._stopped:
                    return
                # A session of its own: an interruption at the keyboard ends it through `stop`, its children too.
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,
                    pass_fds=self.inherited,
                )
                self._processes.add(process)
            status = process.wait()
        with self._lock:
            self._processes.discard(process)
            if self._stopped:
                return
            if status:
                raise RunFailed(run, status, log)
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

    def stop(self) -> None:
        """Ends all processes with their children: by SIGTERM, and by SIGKILL those that do not heed it."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _SECONDS_TO_END
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ}
        paths = [str(TRAIN_SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
            # Threads that spin while they wait make small operations hundreds of times slower where cores are shared.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return environment


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_lines(log: Path) -> str:
    """The end of a failed run's log, for the terminal."""
    return "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-_LINES_OF_A_FAILURE:])


def last_training_record(run: Run, name: str) -> float | None:
    """The last value of a metric in a finished run's training log, None where it never had one."""
    state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    return next((record[name] for record in reversed(state["log_history"]) if name in record), None)
