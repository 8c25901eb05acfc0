"""The tile shapes, warps and stages of every kernel: pinned per head_dim, dtype and architecture; searched on request.

Pinned for registers: at a head_dim of 64 and of 128, with 32-bit offsets, none of these spills in bf16, fp16 or tf32 on
sm_80 and sm_90 (tests/idrm_kernels/test_compile_report.py); other head sizes and 64-bit offsets may, a little, and so
do those of shared prefixes on sm_80. A search changes bits from one machine to the next and is off unless
IDRM_KERNELS_SEARCH=1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

# What kernel launches are compiled for, from the device's architecture; "interpreter" runs them on a CPU.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")

MAX_HEAD_DIM = 256


class Configuration(NamedTuple):
    """How one kernel is compiled: rows and columns of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict:
        """As keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@functools.cache
def block_d(head_dim: int) -> int:
    """The head_dim of a tile: a power of two that a matrix product can take."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def architecture(device: torch.device) -> str:
    """The one of ARCHITECTURES that a device's kernels are configured for."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def uses_descriptors(arch: str) -> bool:
    """Whether q and k are loaded through tensor descriptors: on Hopper and Blackwell pointers would spill."""
    return arch in ("sm_90", "sm_100")


# Kinds of matrix products, the most demanding last: of 16-bit numbers, of float32 on ten bits, of float32 in full.
ARITHMETIC = ("bf16", "fp16", "tf32", "ieee")
COMPARISON = Configuration(16, 128, 4, 1)


def _by_head_dim(*tiles: tuple[int, int, int, int]) -> dict[int, Configuration]:
    """Configurations for a head_dim up to 64, 128 and 256; the last given one for what is beyond it."""
    return {size: Configuration(*tiles[min(i, len(tiles) - 1)]) for i, size in enumerate((64, 128, 256))}


# By kind of product, then by kernel. "shared" is for examples that share a prefix: a map, or a third sum of the query
# gradient, more takes registers; "kl" has float32 derivatives, and its logarithms take some too. Each takes what is
# named without it where it is not named itself, "kl shared" first the other metric's. Row tiles (BLOCK_M) of the
# kernels that have them are of tiles.TILE_SIZES, runs of tiles.RUN_TOKENS, and the key gradient's divide
# plan.SLAB_ROWS.
_HOPPER_BF16 = {
    "logsumexp": _by_head_dim((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
    "logsumexp with bias": _by_head_dim((64, 64, 8, 2)),
    "difference": _by_head_dim((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
    "difference kl": _by_head_dim((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "head_mean": _by_head_dim((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
    "head_mean with bias": _by_head_dim((64, 64, 8, 2)),
    "query_gradient": _by_head_dim((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    "query_gradient kl": _by_head_dim((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "key_gradient": _by_head_dim((64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2)),
    "difference shared": _by_head_dim((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "difference kl shared": _by_head_dim((64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2)),
    "query_gradient shared": _by_head_dim((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
}
_HOPPER = {
    "bf16": _HOPPER_BF16,
    "fp16": {
        **_HOPPER_BF16,
        "query_gradient": _by_head_dim((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        "key_gradient shared": _by_head_dim((64, 128, 8, 3), (64, 64, 8, 2)),
    },
    "tf32": {
        "logsumexp": _by_head_dim((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        "logsumexp with bias": _by_head_dim((64, 64, 8, 2)),
        "difference": _by_head_dim((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
        "difference kl": _by_head_dim((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
        "head_mean": _by_head_dim((64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 1)),
        "head_mean with bias": _by_head_dim((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "query_gradient": _by_head_dim((128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
        "key_gradient": _by_head_dim((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2)),
        "difference shared": _by_head_dim((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "query_gradient shared": _by_head_dim((64, 32, 8, 2), (64, 16, 8, 2)),
    },
    "ieee": {
        "logsumexp": _by_head_dim((64, 64, 8, 1), (64, 32, 8, 1)),
        "logsumexp with bias": _by_head_dim((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 8, 1)),
        "difference": _by_head_dim((64, 64, 8, 1)),
        "head_mean": _by_head_dim((64, 64, 8, 1)),
        "head_mean with bias": _by_head_dim((64, 64, 8, 1)),
        "query_gradient": _by_head_dim((64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
        "key_gradient": _by_head_dim((64, 64, 8, 1), (64, 64, 8, 1), (16, 64, 8, 1)),
    },
}
_BLACKWELL_BF16 = {
    **_HOPPER_BF16,
    "head_mean with bias": _by_head_dim((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    "key_gradient": _by_head_dim((64, 128, 8, 3), (64, 64, 8, 2)),
}
_BLACKWELL = {
    "bf16": _BLACKWELL_BF16,
    "fp16": {**_BLACKWELL_BF16, "query_gradient": _HOPPER["fp16"]["query_gradient"]},
    "tf32": {
        **_HOPPER["tf32"],
        "head_mean with bias": _by_head_dim((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "key_gradient": _by_head_dim((32, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 1)),
        "query_gradient": _by_head_dim((128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1)),
    },
    "ieee": _HOPPER["ieee"],
}
# Every architecture without tables of its own takes these, which keep to the 99 KB of shared memory of sm_86 and sm_89
# (but for full float32 at a head_dim of 256).
_AMPERE_BF16 = {
    "logsumexp": _by_head_dim((128, 64, 8, 2)),
    "logsumexp with bias": _by_head_dim((64, 64, 8, 2)),
    "difference": _by_head_dim((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    "difference kl": _by_head_dim((128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
    "head_mean": _by_head_dim((64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
    "head_mean with bias": _by_head_dim((64, 64, 8, 2)),
    "query_gradient": _by_head_dim((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "key_gradient": _by_head_dim((32, 128, 8, 2), (64, 64, 8, 2)),
    "difference shared": _by_head_dim((64, 64, 8, 2)),
    "query_gradient shared": _by_head_dim((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1)),
}
_AMPERE = {
    "bf16": _AMPERE_BF16,
    "fp16": {**_AMPERE_BF16, "key_gradient kl": _by_head_dim((64, 64, 8, 2))},
    "tf32": {
        "logsumexp": _by_head_dim((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
        "logsumexp with bias": _by_head_dim((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "difference": _by_head_dim((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "head_mean": _by_head_dim((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "head_mean with bias": _by_head_dim((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "query_gradient": _by_head_dim((128, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
        "key_gradient": _by_head_dim((32, 128, 8, 2), (32, 64, 4, 2), (16, 64, 8, 1)),
        "difference shared": _by_head_dim((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "query_gradient shared": _by_head_dim((64, 32, 8, 2), (64, 16, 8, 1)),
    },
    "ieee": _HOPPER["ieee"],
}
# 64 KB of shared memory, warps of 64 threads.
_CDNA3_HALF = {
    "logsumexp": _by_head_dim((128, 64, 4, 1)),
    "logsumexp with bias": _by_head_dim((64, 64, 4, 1)),
    "difference": _by_head_dim((128, 64, 4, 1), (128, 64, 4, 1), (64, 64, 4, 1)),
    "head_mean": _by_head_dim((64, 128, 4, 1), (64, 64, 4, 1)),
    "head_mean with bias": _by_head_dim((64, 64, 4, 1)),
    "query_gradient": _by_head_dim((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    "key_gradient": _by_head_dim((64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1)),
    "difference shared": _by_head_dim((64, 64, 4, 1)),
    "query_gradient shared": _by_head_dim((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
}
_CDNA3_FLOAT = {
    "logsumexp": _by_head_dim((64, 64, 4, 1)),
    "logsumexp with bias": _by_head_dim((64, 64, 4, 1)),
    "difference": _by_head_dim((64, 64, 4, 1)),
    "head_mean": _by_head_dim((64, 64, 4, 1)),
    "head_mean with bias": _by_head_dim((64, 64, 4, 1)),
    "query_gradient": _by_head_dim((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
    "key_gradient": _by_head_dim((32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1)),
}
_CDNA3 = {"bf16": _CDNA3_HALF, "fp16": _CDNA3_HALF, "tf32": _CDNA3_FLOAT, "ieee": _CDNA3_FLOAT}
# Fewer and larger programs are quicker to interpret; the shapes differ so that tests meet several.
_INTERPRETER = {
    "logsumexp": _by_head_dim((128, 64, 1, 1)),
    "logsumexp with bias": _by_head_dim((64, 128, 1, 1)),
    "difference": _by_head_dim((128, 128, 1, 1), (64, 128, 1, 1)),
    "head_mean": _by_head_dim((64, 128, 1, 1), (64, 64, 1, 1)),
    "head_mean with bias": _by_head_dim((64, 128, 1, 1)),
    "query_gradient": _by_head_dim((128, 64, 1, 1), (64, 128, 1, 1)),
    "key_gradient": _by_head_dim((64, 128, 1, 1), (32, 64, 1, 1)),
}
PINNED = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": _CDNA3,
    "interpreter": dict.fromkeys(ARITHMETIC, _INTERPRETER),
}


def pinned(kernel: str, head_dim: int, arithmetic: str, arch: str) -> Configuration:
    """The configuration of a kernel: "logsumexp", "logsumexp with bias", "difference", "difference kl shared"..."""
    own = PINNED[arch][arithmetic]
    plain = kernel.removesuffix(" shared")
    names = (kernel, kernel.replace(" kl", ""), plain, plain.removesuffix(" kl"))
    return own[next(name for name in names if name in own)][max(64, block_d(head_dim))]


def candidates(kernel: str, head_dim: int, arithmetic: str, arch: str) -> list[Configuration]:
    """What a search tries: the pinned configuration first, then other tiles that the plan has, warps and stages."""
    first = pinned(kernel, head_dim, arithmetic, arch)
    rows = (64,) if kernel.startswith("head_mean") else (32, 64) if kernel.startswith("key_gradient") else (64, 128)
    # Keys of the key gradient are tiles of the plan, as rows and columns of pairs are.
    columns = (32, 64, 128) if kernel.startswith(("query_gradient", "logsumexp")) else (64, 128)
    others = itertools.starmap(Configuration, itertools.product(rows, columns, (4, 8), (1, 2, 3)))
    return [first, *(other for other in others if other != first)]


_FASTEST: dict[tuple, Configuration] = {}


def launch_configured(
    kernel: str,
    head_dim: int,
    arithmetic: str,
    arch: str,
    run: Callable[[Configuration], None],
    repeats: bool,
) -> None:
    """Runs a launch as pinned, or where IDRM_KERNELS_SEARCH=1 asks for it in the fastest of the candidates.

    The first launch of a kind that may be repeated is timed in every candidate that compiles and fits; what was found
    holds until the process ends. Never inside of a CUDA graph's capture.
    """
    key = (kernel, head_dim, arithmetic, arch)
    if (
        os.environ.get("IDRM_KERNELS_SEARCH") == "1"
        and arch != "interpreter"
        and repeats
        and key not in _FASTEST
        and not torch.cuda.is_current_stream_capturing()
    ):
        _FASTEST[key] = fastest(candidates(*key), run)
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        # What was found with other options (joint, stored maps) may ask for too much here.
        run(_FASTEST.get(key) or pinned(*key))
        return
    run(pinned(*key))


def fastest(tried: list[Configuration], run: Callable[[Configuration], None]) -> Configuration:
    """The candidate with the lowest median time; one that does not compile, or asks for too much, is passed over."""
    times = {}
    for own in tried:
        with contextlib.suppress(triton.TritonError, RuntimeError):
            times[own] = triton.testing.do_bench(functools.partial(run, own), warmup=5, rep=20, return_mode="median")
    return min(times, key=times.get, default=tried[0])
