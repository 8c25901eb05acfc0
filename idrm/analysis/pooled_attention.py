"""What the pooled token, from whose state the reward is read, attends to in one block."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from idrm.capture import QueryKeyCapture
from idrm.capture.interface import CapturedBlock
from idrm.capture.teacher import FAMILIES
from idrm.errors import InputError


class PooledAttention:
    """A reward model that says beside its rewards how the pooled token's attention in one block is shared out.

    The attention is the model's own, over all tokens that the mask leaves, and with whatever window and capping of
    scores transformers computes it with. It is formed from the block's queries and keys for that row alone.

    Args:
        model: a sequence classifier with one label, in evaluation mode.
        layer: the block, negative from the end.

    Raises InputError for a layer beyond the depth, for models whose queries and keys cannot be captured or do not make
    up the attention (attention sinks; keys in chunks), for encoders, and for models that take no position ids.
    """

    def __init__(self, model: PreTrainedModel, layer: int = -1):
        self._model = model
        self._capture = QueryKeyCapture(model, [layer])
        (self.layer,) = self._capture.layers
        name = type(model).__name__
        if any(model.config.model_type in family.model_types for family in FAMILIES):
            raise InputError(f"{name}: is an encoder; expected a decoder, whose reward is read from the last token")
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise InputError(f"{name}: takes no position ids, which masking must leave as they are")
        for module in model.modules():
            if getattr(module, "layer_idx", None) == self.layer and getattr(module, "sinks", None) is not None:
                raise InputError(f"{name}: layer {self.layer} has attention sinks; expected attention to tokens alone")
        self._window = _sliding_window(model, self.layer)
        config = model.config.get_text_config()
        # transformers' SDPA leaves the scores of such a model uncapped.
        capped = config._attn_implementation != "sdpa"
        self._cap = getattr(config, "attn_logit_softcapping", None) if capped else None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass over sequences padded on the right.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, tokens) int64; what is masked keeps its position, and may lie anywhere.

        Returns:
            rewards (batch,) and attention (batch, tokens), the mean over heads, both in float32, or float64 of such a
            model. Rows of attention sum to 1.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        with self._capture.recording():
            rewards = self._model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            ).logits
        block = self._capture.take()[self.layer]
        pooled = (positions * (input_ids != self._model.config.get_text_config().pad_token_id)).argmax(dim=1)
        distance = pooled[:, None] - positions
        allowed = attention_mask.bool() & (distance >= 0)
        if self._window is not None:
            allowed &= distance < self._window
        scores = _scores_of_rows(block, pooled)
        if self._cap is not None:
            scores = self._cap * torch.tanh(scores / self._cap)
        attention = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        return rewards[:, 0].to(attention.dtype), attention


def _scores_of_rows(block: CapturedBlock, rows: Tensor) -> Tensor:
    """(batch, num_heads, tokens): the scaled scores of one query in each sequence, in float32 or float64."""
    dtype = torch.promote_types(block.query.dtype, torch.float32)
    batch, num_kv_heads, _, head_dim = block.key.shape
    query = block.query[torch.arange(batch, device=rows.device), :, rows].to(dtype)
    query = query.view(batch, num_kv_heads, -1, head_dim)  # the query heads that share a key head
    return (query @ block.key.to(dtype).mT).flatten(1, 2) * block.softmax_scale


def _sliding_window(model: PreTrainedModel, layer: int) -> int | None:
    """How many keys back a row of this layer sees, itself included; None for all."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "full_attention" if window is None else "sliding_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise InputError(f"{type(model).__name__}: layer {layer} has {kind}; expected full or sliding attention")
    return window if kind == "sliding_attention" else None
