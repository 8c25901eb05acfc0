"""Processes that a command starts and waits for: their output in log files, their end with the command's."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from idrm.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
_LINES_OF_A_FAILURE = 15
SECONDS_TO_END = 20


class Crew:
    """The processes at work; every method may be called from several threads.

    Args:
        jobs: processes at a time. With several, each is given its share of this machine's cores.
        inherited: file descriptors that they share, such as that of `idrm.run_folder.sole_use`.
        seconds_to_end: how long they have from SIGTERM to SIGKILL; more than SECONDS_TO_END where they end processes of
            their own, which have that long.
    """

    def __init__(self, jobs: int = 1, inherited: Sequence[int] = (), seconds_to_end: float | None = None):
        self.jobs = jobs
        self.inherited = tuple(inherited)
        self.seconds_to_end = SECONDS_TO_END if seconds_to_end is None else seconds_to_end
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int | None:
        """Runs a command to its end, the command line and its output in `log`.

        Returns:
            Its exit status; None where `stop` ended it or kept it from beginning.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            print(shlex.join(command), file=output, flush=True)
            with self._lock:
                if self._stopped:
                    return None
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
            return None if self._stopped else status

    def stop(self) -> None:
        """Ends all processes with their children: by SIGTERM, and by SIGKILL those that do not heed it."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + self.seconds_to_end
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ}
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
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
    """The end of a failed process's log, for the terminal."""
    return "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-_LINES_OF_A_FAILURE:])


def launcher_of(flag: str, text: str) -> list[str]:
    """The program and arguments that start a training; InputError for one that is not there to be started."""
    try:
        launcher = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{flag} {text}: {str(error).lower()}") from error
    require_program(flag, launcher)
    return launcher


def require_program(flag: str, launcher: Sequence[str]) -> None:
    """Raises InputError for a launcher that is not there to be started."""
    if not launcher or shutil.which(launcher[0]) is None:
        raise InputError(f"{flag} {shlex.join(launcher)}: expected a program that is installed, and its arguments")
