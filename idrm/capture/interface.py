"""Sees the queries and keys that attention modules hand to transformers' attention functions, changing neither.

Outside of a recording nothing happens at all (``idrm.attention_functions``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from idrm.attention_functions import Order, wrap_attention_functions
from idrm.errors import InputError

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclasses.dataclass(frozen=True, slots=True)
class CapturedBlock:
    """What one block's attention was computed from, after RoPE; part of the autograd graph where the model is.

    Attributes:
        query: (batch, num_heads, tokens, head_dim), padding included.
        key: (batch, num_kv_heads, tokens, head_dim), not repeated for grouped queries.
        softmax_scale: factor of query.key.
    """

    query: Tensor
    key: Tensor
    softmax_scale: float


class AttentionRecorder:
    """Keeps the query and key of chosen attention modules for one forward pass.

    A repeated call in a backward pass is activation checkpointing's recomputation and ignored; any other repeated call
    is an error, since its tensors would belong to another forward pass.

    Args:
        layers: the layer of each attention module to watch; modules are told apart by identity, so that another model
            running inside the recording, or a wrapper around this one, makes no difference.
        config: the model's, and ``owner``: whose layers they are, for errors.
    """

    def __init__(self, layers: Mapping[nn.Module, int], config: PretrainedConfig, owner: str):
        self._layers = dict(layers)
        self._config = config
        self._owner = owner
        self._blocks: dict[int, CapturedBlock] = {}
        # Here and not in recording(): a model compiled before the override would never come by it.
        wrap_attention_functions(Order.RECORDERS, _observed)

    @property
    def blocks(self) -> Mapping[int, CapturedBlock]:
        """What has been recorded and not been taken yet, by layer."""
        return self._blocks

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records the one forward pass inside, forgetting any earlier one.

        Raises InputError at the end if a watched layer was not seen, RuntimeError if one was seen twice.
        """
        self._blocks = {}
        _active_recorders.append(self)
        try:
            yield
        except BaseException:
            self._blocks = {}
            raise
        finally:
            _active_recorders.remove(self)
        missing = sorted(set(self._layers.values()) - self._blocks.keys())
        if missing:
            implementation = self._config.get_text_config()._attn_implementation
            raise InputError(
                f"{self._owner}: no query and key seen in layers {missing} under attention implementation "
                f"{implementation!r}: expected a model that transformers' attention interface serves (GPT-J, BLOOM and "
                "MPT are not), and a forward pass of this very model, no replica of it"
            )

    def take(self) -> dict[int, CapturedBlock]:
        """The recorded blocks by layer, which are then forgotten."""
        blocks, self._blocks = self._blocks, {}
        return blocks

    @torch.compiler.disable  # compiled code cannot ask for the graph task, and may lose the block
    def observe(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Keeps query and key if the module is watched and this is no recomputation in a backward pass."""
        layer = self._layers.get(module)
        if layer is None or torch._C._current_graph_task_id() != -1:
            return
        if layer in self._blocks:
            raise RuntimeError(
                f"{self._owner}: layer {layer} called its attention twice in one recording; a recording holds one "
                "forward pass"
            )
        self._blocks[layer] = CapturedBlock(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)


_active_recorders: list[AttentionRecorder] = []


def _observed(attention_function: Callable) -> Callable:
    if not _active_recorders:
        return attention_function

    @functools.wraps(attention_function)
    def observed(module, query, key, *args, **kwargs):
        for recorder in _active_recorders:
            recorder.observe(module, query, key, kwargs.get("scaling"))
        return attention_function(module, query, key, *args, **kwargs)

    return observed
