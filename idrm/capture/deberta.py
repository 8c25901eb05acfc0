"""DeBERTa v1 and v2/v3: queries, keys and position tables from the inputs of the self-attention modules.

DeBERTa computes its attention itself, so a pre-hook keeps the hidden states that enter a supervised block, and the
projections are repeated for the content tokens alone (DESIGN section 2.2). With R the relative position embeddings, D
the head size and f = 1 + the number of position terms (DeBERTa, arXiv 2006.03654, Eq. 4):

    score(i, j) = (q_i.k_j + q_i.pos_key[slot(i - j)] + k_j.pos_query[slot(i - j)]) / sqrt(f D)

Both terms look up the same slot: transformers indexes position-to-content by -bucket(j - i), and buckets are odd.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from idrm.errors import InputError
from idrm_kernels import DisentangledBias, PackedAttention


@dataclasses.dataclass(frozen=True)
class _SlotTable:
    """The slots that differences of up to ``reach`` can fall into: rows first..last of the position embeddings."""

    reach: int
    slot_of_delta: Tensor
    first: int
    last: int


class _Positions(NamedTuple):
    """One layer's projected position embeddings, each (num_slots, num_heads, head_dim), and the terms of its scores."""

    key: Tensor | None
    query: Tensor | None
    num_terms: int

    def to(self, like: Tensor) -> _Positions:
        """The same in the dtype and on the device of another tensor."""
        key, query = (None if table is None else table.to(like) for table in (self.key, self.query))
        return _Positions(key, query, self.num_terms)


class DebertaFamily:
    """How a DeBERTa teacher is loaded and read; see ``idrm.capture.teacher.TeacherFamily``."""

    model_types = ("deberta", "deberta-v2")
    counts_positions = ()

    def __init__(self, model: PreTrainedModel, blocks: Mapping[int, nn.Module]):
        if getattr(model.config, "talking_head", False):
            raise InputError(
                "teacher: DeBERTa with talking_head mixes heads after the scores; expected talking_head=False"
            )
        self._model = model
        v1 = model.config.model_type == "deberta"
        self._project_content = _project_content_v1 if v1 else _project_content_v2
        self._project_positions = _project_positions_v1 if v1 else _project_positions_v2
        self._attentions = {layer: block.attention.self for layer, block in blocks.items()}
        self._slot_tables: dict[tuple[int, torch.device], _SlotTable] = {}
        self._positions: dict[tuple[int, int, torch.dtype, torch.device], _Positions] = {}

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        return config.max_position_embeddings if config.position_biased_input else None

    def attention(
        self, model_inputs: dict[str, Tensor], token_index: Tensor, positions: Tensor, span: int
    ) -> dict[int, PackedAttention]:
        hidden_states: dict[int, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for layer, attention in self._attentions.items():

                def keep(module, args, kwargs, layer=layer):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    hidden_states[layer] = hidden.flatten(0, 1)[token_index]

                hooks.enter_context(attention.register_forward_pre_hook(keep, with_kwargs=True))
            self._model(**model_inputs)
        packed = {}
        for layer, attention in self._attentions.items():
            q, k = self._project_content(attention, hidden_states[layer])
            packed[layer] = self.packed(layer, q, k, positions, span)
        return packed

    def packed(self, layer: int, q: Tensor, k: Tensor, positions: Tensor, span: int) -> PackedAttention:
        slots = self._slots(span, q.device) if self._model.encoder.relative_attention else None
        embedded = self._embedded_positions(layer, slots, q)
        # transformers takes this root in float32 whatever the model's dtype.
        scale = 1.0 / torch.tensor(float(q.shape[-1] * embedded.num_terms)).sqrt().item()
        bias = None
        if embedded.key is not None or embedded.query is not None:
            bias = DisentangledBias(
                positions=positions,
                slot_of_delta=slots.slot_of_delta,
                c2p=None if embedded.key is None else _position_scores(q, embedded.key * scale),
                p2c=None if embedded.query is None else _position_scores(k, embedded.query * scale),
            )
        return PackedAttention(q=q, k=k, softmax_scale=scale, position_bias=bias)

    def _embedded_positions(self, layer: int, slots: _SlotTable | None, like: Tensor) -> _Positions:
        """One layer's projected position embeddings: the weights are frozen, so that each is made once."""
        key = (layer, 0 if slots is None else slots.reach, like.dtype, like.device)
        if key not in self._positions:
            embeddings = None
            if slots is not None:
                embeddings = self._model.encoder.get_rel_embedding()[slots.first : slots.last + 1]
            self._positions[key] = self._project_positions(self._attentions[layer], embeddings).to(like)
        return self._positions[key]

    def _slots(self, span: int, device: torch.device) -> _SlotTable:
        """The slot table for positions below ``span``, rounded up so that few are ever made."""
        reach = -(-span // 64) * 64
        if (reach, device) not in self._slot_tables:
            encoder = self._model.encoder
            # Made by transformers' own function on the model's device: a bucket's edge hangs on one rounding.
            delta = torch.arange(-reach, reach + 1, device=device)
            span = encoder.max_relative_positions
            if getattr(encoder, "position_buckets", -1) > 0:
                delta = make_log_bucket_position(delta, encoder.position_buckets, span).long()
                span = encoder.position_buckets
            slot = (delta + span).clamp(0, 2 * span - 1)
            first, last = slot[0].item(), slot[-1].item()
            self._slot_tables[reach, device] = _SlotTable(reach, (slot - first).int(), first, last)
        return self._slot_tables[reach, device]


def _project_content_v1(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, each (total_tokens, num_heads, head_dim), of the hidden states (total_tokens, hidden)."""
    heads = attention.num_attention_heads
    q, k, _ = attention.in_proj(hidden).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    return q + attention.q_bias.unflatten(-1, (heads, -1)), k.contiguous()


def _project_positions_v1(attention: nn.Module, embeddings: Tensor | None) -> _Positions:
    """Of the position embeddings (num_slots, hidden)."""
    heads = attention.num_attention_heads
    terms = attention.pos_att_type
    key = query = None
    if embeddings is not None and "c2p" in terms:
        key = attention.pos_proj(embeddings).unflatten(-1, (heads, -1))
    if embeddings is not None and "p2c" in terms:
        query = attention.pos_q_proj(embeddings).unflatten(-1, (heads, -1))
    return _Positions(key, query, 1 + len(terms))


def _project_content_v2(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_project_content_v1``, for v2 and v3."""
    heads = attention.num_attention_heads
    q = attention.query_proj(hidden).unflatten(-1, (heads, -1))
    return q, attention.key_proj(hidden).unflatten(-1, (heads, -1))


def _project_positions_v2(attention: nn.Module, embeddings: Tensor | None) -> _Positions:
    """As ``_project_positions_v1``, for v2 and v3, whose projections may be the content's own (share_att_key)."""
    heads = attention.num_attention_heads
    terms = attention.pos_att_type
    key = query = None
    if embeddings is not None and "c2p" in terms:
        project = attention.key_proj if attention.share_att_key else attention.pos_key_proj
        key = project(embeddings).unflatten(-1, (heads, -1))
    if embeddings is not None and "p2c" in terms:
        project = attention.query_proj if attention.share_att_key else attention.pos_query_proj
        query = project(embeddings).unflatten(-1, (heads, -1))
    return _Positions(key, query, 1 + ("c2p" in terms) + ("p2c" in terms))


def _position_scores(content: Tensor, position: Tensor) -> Tensor:
    """(T, H, D) and (slots, H, D) -> their products (T, H, slots), contiguous without a copy."""
    scores = content.new_empty(content.shape[0], content.shape[1], position.shape[0])
    torch.bmm(content.transpose(0, 1), position.permute(1, 2, 0), out=scores.transpose(0, 1))
    return scores
