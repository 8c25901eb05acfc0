"""Time and peak memory of calls, side by side: checked, warmed up, in rounds of changing order."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.contest import Contest
from idrm_kernels.testing.memory import peak_bytes, release_kept_memory

SECONDS_A_CONTEST = 4.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20
# A contest whose round takes longer than this has one round, without a spread.
SLOW_ROUND_SECONDS = 20.0
# A call that takes longer than this is not run again, warm, for its memory.
SLOW_CALL_SECONDS = 5.0
# More than the second-level cache of any GPU: written between rounds, so that none finds its inputs there.
L2_FLUSH_BYTES = 256 << 20
# Of the memory that is free: what a run may be expected to take.
USABLE_SHARE = 0.85


@dataclasses.dataclass
class Measurement:
    """One variant of a contest.

    Attributes:
        seconds: duration of every round; empty where it did not run. Rounds of a contest's variants belong together.
        peak_bytes: rise of the peak memory over what was in use before: of CUDA's allocator on a GPU, of the process's
            resident memory on a CPU (of torch's allocator where the system does not tell).
        before_bytes: what was in use before.
        needed_bytes: what it would need at least, where that is more than there is.
        failure: why no number of it can be believed.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    before_bytes: int | None = None
    needed_bytes: int | None = None
    failure: str | None = None


def measure(contest: Contest, names: tuple[str, ...]) -> dict[str, Measurement]:
    """Measures variants of a contest by rounds in which each runs once, in an order drawn anew."""
    measurements = {name: Measurement() for name in names}
    calls: dict[str, Callable[[], object]] = {}
    round_seconds = 0.0
    for name in names:
        measurement = measurements[name]
        try:
            measurement.needed_bytes = _bytes_beyond_reach(contest, name)
            if measurement.needed_bytes is None:
                measurement.failure = contest.check(name)
            if measurement.needed_bytes is None and measurement.failure is None:
                (calls[name],) = contest.variants((name,)).values()
                round_seconds += _warm_up(contest, name, calls[name], measurement)
        except torch.OutOfMemoryError:
            measurement.needed_bytes = 0  # set below: what failed is held by the exception until it is handled
        except Exception as error:  # one variant's failure is a row, and the others' numbers stand
            measurement.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if measurement.needed_bytes == 0:
            torch.cuda.empty_cache()
            measurement.needed_bytes = available_bytes(contest.device)
        if measurement.needed_bytes is not None or measurement.failure is not None:
            calls.pop(name, None)
            measurement.peak_bytes = measurement.before_bytes = None
    rounds = min(max(int(SECONDS_A_CONTEST / max(round_seconds, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)
    if round_seconds > SLOW_ROUND_SECONDS:
        rounds = 1
    order, source = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            source.shuffle(order)
            for name in order:
                measurements[name].seconds.append(seconds_of(calls[name], contest.device))
    finally:
        gc.enable()
    return measurements


def _bytes_beyond_reach(contest: Contest, name: str) -> int | None:
    needed = contest.needed_bytes(name)
    return needed if needed is not None and needed > USABLE_SHARE * available_bytes(contest.device) else None


def _warm_up(contest: Contest, name: str, call: Callable[[], object], measurement: Measurement) -> float:
    """Runs a call for its memory, twice unless it is slow, and checks what it returned; how long the last run took.

    The smaller rise counts: a first run's code and caches, and memory that a process is slow to return, only add.
    """
    for _ in range(2):
        start = time.perf_counter()
        before, rise, result = peak_rise(call, contest.device)
        seconds = time.perf_counter() - start
        if measurement.peak_bytes is None or rise < measurement.peak_bytes:
            measurement.before_bytes, measurement.peak_bytes = before, rise
        if seconds > SLOW_CALL_SECONDS:
            break
    measurement.failure = contest.check_result(name, result)
    return seconds


def seconds_of(call: Callable[[], object], device: str) -> float:
    """One run's duration: on a GPU between events, launches included, with a cold second-level cache."""
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


def peak_rise(call: Callable[[], object], device: str) -> tuple[int, int, object]:
    """Bytes in use before a call, how far it raises the peak over them, and what it returns.

    Nothing that an implementation keeps from earlier calls counts as in use before.
    """
    gc.collect()
    release_kept_memory()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated() - before, result
    before = _reset_resident_peak()
    if before is None:
        return 0, peak_bytes(call), call()
    result = call()
    return before, _process_bytes("VmHWM") - before, result


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
