"""Queries and keys of a decoder's supervised blocks, from its own forward pass and attention backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

from idrm.capture.interface import SUPPORTED_IMPLEMENTATIONS, AttentionRecorder, CapturedBlock
from idrm.capture.layers import resolve_layers
from idrm.errors import InputError


def check_supported(model: PreTrainedModel) -> None:
    """Raises InputError if the queries and keys of this model, as configured now, cannot be captured with gradient."""
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in SUPPORTED_IMPLEMENTATIONS:
        raise InputError(
            f"student: attention implementation {implementation!r} is unknown; expected one of "
            + ", ".join(SUPPORTED_IMPLEMENTATIONS)
        )
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if (
            getattr(module, "gradient_checkpointing", False)
            and isinstance(checkpoint, functools.partial)
            and checkpoint.keywords.get("use_reentrant", False)
        ):
            raise InputError(
                "student: reentrant activation checkpointing gives captured queries and keys no gradient; "
                "expected use_reentrant=False"
            )


class QueryKeyCapture:
    """Captures the queries and keys of chosen layers while the model, or any wrapper around it, runs.

    ::

        with capture.recording():
            rewards = model(**inputs).logits        # or a DDP or DeepSpeed wrapper of model
        blocks = capture.take()                     # layer -> CapturedBlock

    Args:
        model: the base model, with ``layer_idx`` on its attention modules as transformers' decoders have it.
        layers: indices of the blocks to capture, negative ones from the end.

    Raises InputError for a layer beyond the depth and for what ``check_supported`` refuses.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]):
        check_supported(model)
        self.layers = resolve_layers(layers, model.config.get_text_config().num_hidden_layers, "student")
        modules = {
            module: module.layer_idx for module in model.modules() if getattr(module, "layer_idx", None) in self.layers
        }
        unknown = sorted(set(self.layers) - set(modules.values()))
        if unknown:
            raise InputError(f"student: {type(model).__name__} has no modules whose layer_idx is one of {unknown}")
        self._model = model
        self._recorder = AttentionRecorder(modules, model.config, "student")

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records the one forward pass inside, in training or evaluation.

        Raises InputError at the end if a layer was not seen, or in training came without gradient; RuntimeError if it
        was seen twice.
        """
        needs_gradient = self._model.training and torch.is_grad_enabled()
        with self._recorder.recording():
            yield
        blocks = self._recorder.blocks
        detached = [
            layer
            for layer in sorted(blocks)
            if not (blocks[layer].query.requires_grad or blocks[layer].key.requires_grad)
        ]
        if needs_gradient and detached:
            self._recorder.take()
            raise InputError(
                f"student: the queries and keys of layers {detached} carry no gradient; expected activation "
                "checkpointing with use_reentrant=False, and trainable parameters in or below these layers"
            )

    def take(self) -> dict[int, CapturedBlock]:
        """The blocks of the last recording by layer (counted from 0), which are then forgotten.

        Raises RuntimeError if there is none.
        """
        blocks = self._recorder.take()
        if not blocks:
            raise RuntimeError(
                "student: nothing to take; expected a forward pass inside recording() since the last take()"
            )
        return blocks
