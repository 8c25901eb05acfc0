"""Time and peak memory of calls, side by side: warmed up, in alternating rounds, with one run for the memory."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.contest import Contest
from idrm_kernels.testing.memory import peak_bytes, release_kept_memory

SECONDS_A_CONTEST = 4.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20
# A contest whose round takes longer has one, without a spread; a call that does is not run again for its memory alone.
SLOW_ROUND, SLOW_CALL = 20.0, 5.0
# More than the second-level cache of any GPU: written between rounds, so that none finds its inputs there.
L2_FLUSH_BYTES = 256 << 20
# Of the memory that is free: what a run may be expected to take.
USABLE_SHARE = 0.85


@dataclasses.dataclass
class Measurement:
    """One variant of a contest.

    Attributes:
        seconds: duration of every round; empty where it did not run.
        peak_bytes: rise of the peak memory over the inputs: of CUDA's allocator on a GPU, of the process's resident
            memory on a CPU (of torch's allocator where the system does not tell).
        needed_bytes: what it would have needed, where that is more than there is.
        failure: why no number of it can be believed.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    needed_bytes: int | None = None
    failure: str | None = None


def measure(contest: Contest, names: tuple[str, ...]) -> dict[str, Measurement]:
    """Measures variants of a contest by rounds in which each runs once, and the order turns."""
    measurements = {name: Measurement() for name in names}
    runnable = []
    for name in names:
        needed = contest.needed_bytes(name)
        if needed is not None and needed > USABLE_SHARE * available_bytes(contest.device):
            measurements[name].needed_bytes = needed
        elif failure := contest.check(name):
            measurements[name].failure = failure
        else:
            runnable.append(name)
    calls = dict(contest.variants(tuple(runnable)))
    estimate = 0.0
    for name in runnable:
        try:
            for _ in range(2):  # the first run warms up
                start = time.perf_counter()
                measurements[name].peak_bytes = peak_rise(calls[name], contest.device)
                duration = time.perf_counter() - start
                if duration > SLOW_CALL:
                    break
            estimate += duration
        except torch.cuda.OutOfMemoryError:
            measurements[name].needed_bytes = contest.needed_bytes(name) or available_bytes(contest.device)
            del calls[name]
    rounds = min(max(int(SECONDS_A_CONTEST / max(estimate, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)
    if estimate > SLOW_ROUND:
        rounds = 1
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            measurements[name].seconds.append(seconds_of(calls[name], contest.device))
        order = order[1:] + order[:1]
    return measurements


def seconds_of(call: Callable[[], object], device: str) -> float:
    """One run's duration: on a GPU between events, with a cold second-level cache."""
    gc.collect()
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_rise(call: Callable[[], object], device: str) -> int:
    """How far a call raises the peak memory over what is in use before it, nothing being kept for it, in bytes."""
    gc.collect()
    release_kept_memory()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _reset_resident_peak()
    if before is None:
        return peak_bytes(call)
    call()
    return _process_bytes("VmHWM") - before


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    limits = [_control_group_bytes()]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) << 10)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else 1 << 62


def _control_group_bytes() -> int | None:
    """What the process's memory limit leaves, where it has one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else int(limit) - int(used)
    except OSError:
        return None


def _reset_resident_peak() -> int | None:
    """Hands freed memory back and sets the peak of the resident memory to what is in use: bytes; None off Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _process_bytes("VmRSS")


def _process_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


class RecordedClock:
    """A timer that replays durations measured before.

    pytest-benchmark times one test after another; the rounds here alternate between variants. Each variant's test
    hands its durations over by running nothing between two readings of this clock.
    """

    __name__ = "RecordedClock"

    def __init__(self, seconds: list[float]):
        self._readings = self._ticks(seconds)

    @staticmethod
    def _ticks(seconds: list[float]) -> Iterator[float]:
        for duration in seconds:
            yield 0.0
            yield duration

    def __call__(self) -> float:
        return next(self._readings)
