"""BERT-like encoders: queries and keys as they enter transformers' attention interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from idrm.capture.interface import SUPPORTED_IMPLEMENTATIONS, AttentionRecorder
from idrm.errors import InputError, refusals
from idrm_kernels import PackedAttention


class BertFamily:
    """How a BERT-like teacher is loaded and read; see ``idrm.capture.teacher.TeacherFamily``."""

    model_types = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")

    # Their position ids start after the pad token's id, and they skip padding by themselves.
    counts_positions = ("camembert", "roberta", "xlm-roberta")
    is_rotary = False

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], attn_implementation: str | None):
        if getattr(model.config, "is_decoder", False):
            raise InputError("teacher: is_decoder true hides the tokens to the right; expected an encoder")
        implementation = attn_implementation or model.config._attn_implementation
        if implementation not in SUPPORTED_IMPLEMENTATIONS:
            raise InputError(
                f"teacher: attention implementation {implementation!r} is unknown; expected one of "
                + ", ".join(SUPPORTED_IMPLEMENTATIONS)
            )
        if attn_implementation is not None:
            with refusals(f"teacher: attention implementation {attn_implementation!r}"):
                model.set_attn_implementation(attn_implementation)
        self._model = model
        blocks = self.blocks(model)
        modules = {self.attention_module(blocks[layer]): layer for layer in layers}
        self._recorder = AttentionRecorder(modules, model.config, "teacher")

    @classmethod
    def supervisable_layers(cls, config: PretrainedConfig) -> list[int]:
        return list(range(config.num_hidden_layers))

    @classmethod
    def blocks(cls, model: PreTrainedModel) -> nn.ModuleList:
        return model.transformer.layer if model.config.model_type == "distilbert" else model.encoder.layer

    @classmethod
    def attention_module(cls, block: nn.Module) -> nn.Module:
        """The module that calls the attention function."""
        return getattr(block.attention, "self", block.attention)

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {} if config.model_type in ("distilbert", "electra") else {"add_pooling_layer": False}

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        if config.model_type not in cls.counts_positions:
            return config.max_position_embeddings
        if config.pad_token_id is None:
            raise InputError(f"teacher: {config.model_type} counts positions from pad_token_id, which its config lacks")
        reserved = config.pad_token_id + 1
        return config.max_position_embeddings - reserved

    def attention(
        self, model_inputs: dict[str, Tensor], token_index: Tensor, positions: Tensor, span: int
    ) -> dict[int, PackedAttention]:
        with self._recorder.recording():
            self._model(**model_inputs)
        return {
            layer: PackedAttention(
                q=block.query.transpose(1, 2).flatten(0, 1)[token_index],
                k=block.key.transpose(1, 2).flatten(0, 1)[token_index],
                softmax_scale=block.softmax_scale,
            )
            for layer, block in self._recorder.take().items()
        }

    def packed(self, layer: int, q: Tensor, k: Tensor, positions: Tensor, span: int) -> PackedAttention:
        return PackedAttention(q=q, k=k)
