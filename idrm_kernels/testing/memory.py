"""What a call allocates, for tests of memory and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest sum of what lives at once of the memory that a call allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    events = measured.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = highest = 0
    for _, change in changes:
        live += change
        highest = max(highest, live)
    return highest
