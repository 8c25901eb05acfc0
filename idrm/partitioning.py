"""ZeRO-3 partitions what is loaded while it is set up; what is not trained is left whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.integrations import deepspeed as deepspeed_integration


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Hides a ZeRO-3 configuration, under which from_pretrained would partition the model's weights."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    configured = None if reference is None else reference()
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if configured is not None:
            deepspeed_integration.set_hf_deepspeed_config(configured)
