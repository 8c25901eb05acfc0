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

    slot_of_delta: Tensor
    first: int
    last: int


class _Projections(NamedTuple):
    q: Tensor  # (total_tokens, num_heads, head_dim)
    k: Tensor
    pos_key: Tensor | None  # (num_slots, num_heads, head_dim)
    pos_query: Tensor | None
    num_terms: int


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
        self._project = _project_v1 if model.config.model_type == "deberta" else _project_v2
        self._attentions = {layer: block.attention.self for layer, block in blocks.items()}
        self._slot_tables: dict[tuple[int, torch.device], _SlotTable] = {}

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        return config.max_position_embeddings if config.position_biased_input else None

    def attention(
        self, model_inputs: dict[str, Tensor], token_index: Tensor, positions: Tensor
    ) -> dict[int, PackedAttention]:
        hidden_states: dict[int, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for layer, attention in self._attentions.items():

                def keep(module, args, kwargs, layer=layer):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    hidden_states[layer] = hidden.flatten(0, 1)[token_index]

                hooks.enter_context(attention.register_forward_pre_hook(keep, with_kwargs=True))
            self._model(**model_inputs)

        slots = embeddings = None
        if self._model.encoder.relative_attention:
            slots = self._slots(model_inputs["input_ids"].shape[1], token_index.device)
            embeddings = self._model.encoder.get_rel_embedding()[slots.first : slots.last + 1]
        packed = {}
        for layer, attention in self._attentions.items():
            q, k, pos_key, pos_query, num_terms = self._project(attention, hidden_states[layer], embeddings)
            # transformers takes this root in float32 whatever the model's dtype.
            scale = 1.0 / torch.tensor(float(q.shape[-1] * num_terms)).sqrt().item()
            bias = None
            if pos_key is not None or pos_query is not None:
                bias = DisentangledBias(
                    positions=positions,
                    slot_of_delta=slots.slot_of_delta,
                    c2p=None if pos_key is None else _position_scores(q, pos_key * scale),
                    p2c=None if pos_query is None else _position_scores(k, pos_query * scale),
                )
            packed[layer] = PackedAttention(q=q, k=k, softmax_scale=scale, position_bias=bias)
        return packed

    def _slots(self, length: int, device: torch.device) -> _SlotTable:
        """The slot table for inputs of this length, rounded up so that few are ever made."""
        reach = -(-length // 64) * 64
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
            self._slot_tables[reach, device] = _SlotTable((slot - first).int(), first, last)
        return self._slot_tables[reach, device]


def _project_v1(attention: nn.Module, hidden: Tensor, embeddings: Tensor | None) -> _Projections:
    """Of the content tokens' hidden states (total_tokens, hidden) and position embeddings (num_slots, hidden)."""
    heads = attention.num_attention_heads
    q, k, _ = attention.in_proj(hidden).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    q = q + attention.q_bias.unflatten(-1, (heads, -1))
    terms = attention.pos_att_type
    pos_key = pos_query = None
    if embeddings is not None and "c2p" in terms:
        pos_key = attention.pos_proj(embeddings).unflatten(-1, (heads, -1))
    if embeddings is not None and "p2c" in terms:
        pos_query = attention.pos_q_proj(embeddings).unflatten(-1, (heads, -1))
    return _Projections(q, k.contiguous(), pos_key, pos_query, 1 + len(terms))


def _project_v2(attention: nn.Module, hidden: Tensor, embeddings: Tensor | None) -> _Projections:
    """As ``_project_v1``, for v2 and v3, whose position projections may be the content's own (share_att_key)."""
    heads = attention.num_attention_heads
    q = attention.query_proj(hidden).unflatten(-1, (heads, -1))
    k = attention.key_proj(hidden).unflatten(-1, (heads, -1))
    terms = attention.pos_att_type
    pos_key = pos_query = None
    if embeddings is not None and "c2p" in terms:
        project = attention.key_proj if attention.share_att_key else attention.pos_key_proj
        pos_key = project(embeddings).unflatten(-1, (heads, -1))
    if embeddings is not None and "p2c" in terms:
        project = attention.query_proj if attention.share_att_key else attention.pos_query_proj
        pos_query = project(embeddings).unflatten(-1, (heads, -1))
    return _Projections(q, k, pos_key, pos_query, 1 + ("c2p" in terms) + ("p2c" in terms))


def _position_scores(content: Tensor, position: Tensor) -> Tensor:
    """(T, H, D) and (slots, H, D) -> their products (T, H, slots), contiguous without a copy."""
    scores = content.new_empty(content.shape[0], content.shape[1], position.shape[0])
    torch.bmm(content.transpose(0, 1), position.permute(1, 2, 0), out=scores.transpose(0, 1))
    return scores
