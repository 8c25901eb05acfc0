"""ModernBERT: queries and keys of its global layers, after RoPE, as they enter transformers' attention interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from idrm.capture.bert import BertFamily
from idrm.errors import InputError


class ModernBertFamily(BertFamily):
    """How a ModernBERT teacher is loaded and read; see ``idrm.capture.teacher.TeacherFamily``.

    Most of its layers are local, each token reading a window around it alone: their maps have no entries between the
    two sequences, and are refused.
    """

    model_types = ("modernbert",)
    counts_positions = ()
    is_rotary = True

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], attn_implementation: str | None):
        config = model.config
        depth = len(config.layer_types)
        global_layers = self.supervisable_layers(config)
        local_layers = [layer for layer in layers if layer not in global_layers]
        if local_layers:
            listed = ", ".join(f"{layer} ({layer - depth})" for layer in global_layers)
            remedy = f"give --teacher_layers {global_layers[-1] - depth}, the last of the global ones: {listed}"
            raise InputError(
                f"teacher: layer {local_layers[0]} ({local_layers[0] - depth}) is local, with a window of "
                f"{config.local_attention} tokens; " + (remedy if global_layers else "it has no global layer")
            )
        super().__init__(model, layers, attn_implementation)

    @classmethod
    def supervisable_layers(cls, config: PretrainedConfig) -> list[int]:
        return [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]

    @classmethod
    def blocks(cls, model: PreTrainedModel) -> nn.ModuleList:
        return model.layers

    @classmethod
    def attention_module(cls, block: nn.Module) -> nn.Module:
        return block.attn

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        return config.max_position_embeddings
