"""What this project does around transformers' attention functions, in the one place where models look them up.

``AttentionInterface.get_interface`` gives every model its attention function, its own eager function included. It is
overridden in place, once per process and transparently: names, masks and results stay those of the configured
implementation. (An attention function registered under a name of its own would get no mask under left padding.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import IntEnum

from transformers.modeling_utils import AttentionInterface

Wrapper = Callable[[Callable], Callable]


class Order(IntEnum):
    """Who wraps whom: the later one is outside, and sees what the model itself hands over."""

    PACKED_PAIRS = 0
    RECORDERS = 1


_wrappers: dict[Order, Wrapper] = {}


def wrap_attention_functions(order: Order, wrapper: Wrapper) -> None:
    """Has every attention function that is looked up from now on wrapped so; said twice, it is done once."""
    _wrappers[order] = wrapper
    _override_get_interface()


@functools.cache
def _override_get_interface() -> None:
    original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self, *args, **kwargs) -> Callable:
        attention_function = original(self, *args, **kwargs)
        for order in sorted(_wrappers):
            attention_function = _wrappers[order](attention_function)
        return attention_function

    AttentionInterface.get_interface = get_interface
