"""What a call allocates, for tests of memory and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from idrm_kernels.ops import IMPLEMENTATIONS


def release_kept_memory() -> None:
    """Has implementations hand back what they keep between calls: the next one is measured with all that it takes."""
    if "cpp" in IMPLEMENTATIONS:
        IMPLEMENTATIONS["cpp"].release_memory()


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest sum of the memory that a call holds at once on the CPU, nothing being kept before."""
    release_kept_memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    events = measured.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        highest = max(highest, live)
    return highest
