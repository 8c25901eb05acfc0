"""Work that an accelerator may do beside what is enqueued after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class SideStream:
    """A CUDA stream of its own for work that the current stream needs only later; elsewhere work is done at once.

    What the work allocates comes from the side stream's pool, and every piece of work begins once the current stream
    has done what was enqueued before: so what consumers of an earlier result still read is never overwritten. What the
    work reads, and writes in place, the caller keeps until the result is asked for.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, device: torch.device, work: Callable[[], Result]) -> Callable[[], Result]:
        """Enqueues the work; the function returned makes the current stream wait for it, and gives its result."""
        if device.type != "cuda":
            result = work()
            return lambda: result
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            result = work()

        def finish() -> Result:
            torch.cuda.current_stream(device).wait_stream(side)
            return result

        return finish
