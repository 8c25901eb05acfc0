"""What is measured: a workload, and the variants of doing it that compete side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch


class Contest(Protocol):
    """A workload with its variants: a frozen dataclass whose fields say what it is, so that one run measures it once.

    Attributes:
        device: "cpu" or "cuda".
    """

    device: str

    @property
    def suite(self) -> str:
        """The table that it belongs to."""

    @property
    def name(self) -> str:
        """One word without spaces, for test ids."""

    def variants(self, names: tuple[str, ...]) -> Mapping[str, Callable[[], object]]:
        """A call that does the whole workload once, for each of these variants, on the same random inputs."""

    def check(self, variant: str) -> str | None:
        """What is wrong with a variant's results, by the tests' rule on a smaller workload; None where nothing is."""

    def check_result(self, variant: str, result: object) -> str | None:
        """What is wrong with what a variant's call returned on this very workload; None where nothing is."""

    def needed_bytes(self, variant: str) -> int | None:
        """Peak memory that a variant is expected to need, where it could be more than there is; else None."""

    def roof_seconds(self, variant: str) -> float | None:
        """What the machine could do this variant's arithmetic in; None where it is not known."""


# The fused implementation of each device.
FUSED = {"cpu": "cpp", "cuda": "triton"}
# Behind an implementation's name: given a shared prefix in every segment, as a layout without sharing has it.
REPEATED = "-repeated"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
