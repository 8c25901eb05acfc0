"""The time below which a machine's matrix products and exponentials do not let an algorithm go: their sum, no overlap.

Rates are those of torch's own products and, on a CPU, exponentials, measured in the run; on a GPU 16 exponentials a
cycle and multiprocessor at the highest clock, where torch tells it. Counts are those of docs/kernels.md.
"""

from __future__ import annotations

import functools
import time

import torch

from benchmarks.contest import DTYPES

# (variant, passes): products of 2 head_dim FLOP and exponentials per (i, j, head), of the student and of the teacher.
COUNTS = {
    ("cpp", "forward_backward"): ((3, 1), (1, 1)),
    ("cpp", "forward"): ((1, 1), (1, 1)),
    ("triton", "forward_backward"): ((7, 4), (2, 2)),
    ("triton", "forward"): ((2, 2), (2, 2)),
    ("sdpa", "forward_backward"): ((7, 2), (2, 1)),
    ("sdpa", "forward"): ((2, 1), (2, 1)),
}


def seconds(
    device: str, dtype: str, entries: list[tuple[int, int]], counts: tuple[tuple[int, int], ...]
) -> float | None:
    """The roof for sides of (map entries of all heads, head_dim); None where a rate is not known."""
    exps = exps_per_second(device)
    if exps is None:
        return None
    flops = flops_per_second(device, dtype)
    return sum(
        number * (products * 2 * head_dim / flops + exponentials / exps)
        for (number, head_dim), (products, exponentials) in zip(entries, counts, strict=True)
    )


@functools.cache
def flops_per_second(device: str, dtype: str) -> float:
    """What a large square matrix product of torch reaches: the best of several."""
    size = 1536 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device)


@functools.cache
def exps_per_second(device: str) -> float | None:
    """Exponentials in float32 of all cores, or of all special function units."""
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        kilohertz = getattr(properties, "clock_rate", None)
        return None if kilohertz is None else properties.multi_processor_count * 16 * kilohertz * 1e3
    values = torch.rand(torch.get_num_threads() * 65536)  # in the second-level cache, and enough to share among threads
    output = torch.empty_like(values)
    return len(values) / _best_seconds(lambda: torch.exp(values, out=output), device)


def _best_seconds(call, device: str) -> float:
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
