"""DeBERTa v1 and v2/v3: queries, keys and position tables from the inputs of the self-attention modules.

DeBERTa computes its attention itself, so a pre-hook keeps the hidden states that enter a supervised block, and the
projections are repeated for the content tokens alone (DESIGN section 2.2). With R the relative position embeddings, D
the head size and f = 1 + the number of position terms (DeBERTa, arXiv 2006.03654, Eq. 4):

    score(i, j) = (q_i.k_j + q_i.pos_key[slot(i - j)] + k_j.pos_query[slot(i - j)]) / sqrt(f D)

Both terms look up the same slot: transformers indexes position-to-content by -bucket(j - i), and buckets are odd.

transformers' own forward pass holds several maps of all heads in every block. Unless it is asked for ("eager"), the
blocks' attention is replaced by one that holds none (``idrm.capture.disentangled_attention``), in this model alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from idrm.capture.disentangled_attention import flashdeberta, flashdeberta_obstacle, sdpa_in_row_chunks
from idrm.errors import InputError
from idrm_kernels import DisentangledBias, PackedAttention

ATTN_IMPLEMENTATIONS = ("eager", "sdpa", "flashdeberta")


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

    def softmax_scale(self, head_dim: int) -> float:
        # transformers takes this root in float32 whatever the model's dtype.
        return 1.0 / torch.tensor(float(head_dim * self.num_terms)).sqrt().item()

    def to(self, like: Tensor) -> _Positions:
        """The same in the dtype and on the device of another tensor."""
        return self._each(lambda table: table.to(like))

    def of_slots(self, first: int, last: int) -> _Positions:
        """Those of the slots first..last."""
        return self._each(lambda table: table[first : last + 1])

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Positions:
        key, query = (None if table is None else change(table) for table in (self.key, self.query))
        return _Positions(key, query, self.num_terms)


class DebertaFamily:
    """How a DeBERTa teacher is loaded and read; see ``idrm.capture.teacher.TeacherFamily``."""

    model_types = ("deberta", "deberta-v2")
    counts_positions = ()
    is_rotary = False

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], attn_implementation: str | None):
        if getattr(model.config, "talking_head", False):
            raise InputError(
                "teacher: DeBERTa with talking_head mixes heads after the scores; expected talking_head=False"
            )
        if getattr(model.config, "position_buckets", -1) == 1:
            raise InputError("teacher: DeBERTa with one position bucket has no differences; expected more, or -1")
        if attn_implementation not in (None, *ATTN_IMPLEMENTATIONS):
            raise InputError(
                f"teacher: attention implementation {attn_implementation!r} is unknown to DeBERTa; expected one of "
                + ", ".join(ATTN_IMPLEMENTATIONS)
            )
        self._model = model
        self._implementation = attn_implementation
        if attn_implementation == "flashdeberta":
            self._require_flashdeberta(None)
        v1 = model.config.model_type == "deberta"
        self._project_content = _project_content_v1 if v1 else _project_content_v2
        self._project_positions = _project_positions_v1 if v1 else _project_positions_v2
        self._blocks = {layer: model.encoder.layer[layer] for layer in layers}
        self._slot_tables: dict[tuple[int, torch.device], _SlotTable] = {}
        self._positions: dict[tuple[int, torch.dtype], _Positions] = {}
        if attn_implementation != "eager":
            # What the blocks are handed: the mask of the tokens, and none of the (tokens, tokens) differences.
            model.encoder.get_attention_mask = Tensor.bool
            model.encoder.get_rel_pos = lambda *args, **kwargs: None
            for block in model.encoder.layer:
                block.attention.self.forward = functools.partial(self._attend, block.attention.self)
        # Of the highest supervised block only what enters it is read.
        model.encoder.layer[max(layers)].forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)

    @classmethod
    def supervisable_layers(cls, config: PretrainedConfig) -> list[int]:
        return list(range(config.num_hidden_layers))

    @classmethod
    def blocks(cls, model: PreTrainedModel) -> nn.ModuleList:
        return model.encoder.layer

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        return config.max_position_embeddings if config.position_biased_input else None

    def attention(
        self, model_inputs: dict[str, Tensor], token_index: Tensor, positions: Tensor, span: int
    ) -> dict[int, PackedAttention]:
        if self._uses_flashdeberta(token_index.device):
            model_inputs, token_index = _padded_right(model_inputs, token_index)
        hidden_states: dict[int, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for layer, block in self._blocks.items():

                def keep(module, args, kwargs, layer=layer):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    hidden_states[layer] = hidden.flatten(0, 1)[token_index]

                hooks.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True))
            # As the model's forward does, which besides has the encoder keep what every block returns.
            mask = model_inputs["attention_mask"]
            embedded = self._model.embeddings(
                **{name: value for name, value in model_inputs.items() if name != "attention_mask"}, mask=mask
            )
            self._model.encoder(embedded, mask, output_hidden_states=False)
        packed = {}
        for layer, block in self._blocks.items():
            q, k, _ = self._project_content(block.attention.self, hidden_states[layer])
            packed[layer] = self.packed(layer, q, k, positions, span)
        return packed

    def packed(self, layer: int, q: Tensor, k: Tensor, positions: Tensor, span: int) -> PackedAttention:
        slots = self._slots(span, q.device) if self._model.encoder.relative_attention else None
        embedded = self._embedded_positions(layer, slots, q)
        scale = embedded.softmax_scale(q.shape[-1])
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
        """One layer's projected position embeddings of these slots: the weights are frozen, and all are made once."""
        if (layer, like.dtype) not in self._positions:
            embeddings = None if slots is None else self._model.encoder.get_rel_embedding()
            whole = self._project_positions(self._blocks[layer].attention.self, embeddings)
            self._positions[layer, like.dtype] = whole
        # Where the teacher is not, behind a cache, the position embeddings may still be wanted.
        whole = self._positions[layer, like.dtype] = self._positions[layer, like.dtype].to(like)
        return whole if slots is None else whole.of_slots(slots.first, slots.last)

    def _attend(
        self, attention: nn.Module, hidden_states: Tensor, mask: Tensor, *_, rel_embeddings: Tensor | None = None, **__
    ) -> tuple[Tensor, None]:
        """In place of the forward of a block's self-attention: (batch, tokens, hidden) and its mask (batch, tokens)."""
        encoder, device = self._model.encoder, hidden_states.device
        q, k, v = self._project_content(attention, hidden_states)
        if self._uses_flashdeberta(device):
            embedded = self._project_positions(attention, rel_embeddings)
            buckets = getattr(encoder, "position_buckets", -1)
            ranges = {"position_buckets": buckets, "max_relative_positions": encoder.max_relative_positions}
            compute = functools.partial(flashdeberta, **ranges)
        else:
            slots = None if rel_embeddings is None else self._slots(hidden_states.shape[1], device)
            embeddings = None if slots is None else rel_embeddings[slots.first : slots.last + 1]
            embedded = self._project_positions(attention, embeddings)
            compute = functools.partial(sdpa_in_row_chunks, slot_of_delta=slots and slots.slot_of_delta)
        scale = embedded.softmax_scale(q.shape[-1])
        context = compute(q, k, v, mask, softmax_scale=scale, pos_key=embedded.key, pos_query=embedded.query)
        return context.flatten(-2), None

    def _require_flashdeberta(self, device: torch.device | None) -> None:
        obstacle = self._flashdeberta_obstacle(device)
        if obstacle is not None:
            raise InputError(f"teacher: attention implementation 'flashdeberta' {obstacle}")

    def _flashdeberta_obstacle(self, device: torch.device | None) -> str | None:
        head_dim = self._model.encoder.layer[0].attention.self.attention_head_size
        return flashdeberta_obstacle(self._model.dtype, head_dim, device)

    def _uses_flashdeberta(self, device: torch.device) -> bool:
        """Whether the blocks on this device do. Raises InputError where it was asked for and cannot run."""
        if self._implementation == "flashdeberta":
            self._require_flashdeberta(device)
        elif self._implementation is not None:
            return False
        has_bias = self._model.encoder.relative_attention and bool(self._model.config.pos_att_type)
        return has_bias and self._flashdeberta_obstacle(device) is None

    def _slots(self, span: int, device: torch.device) -> _SlotTable:
        """The slot table for positions below ``span``, rounded up so that few are ever made."""
        reach = -(-span // 64) * 64
        if (reach, device) not in self._slot_tables:
            encoder = self._model.encoder
            # Made by transformers' own function on the model's device: a bucket's edge hangs on one rounding.
            delta = torch.arange(-reach, reach + 1, device=device)
            zero = encoder.max_relative_positions  # the slot of no difference
            if getattr(encoder, "position_buckets", -1) > 0:
                delta = make_log_bucket_position(delta, encoder.position_buckets, zero).long()
                zero = encoder.position_buckets
            slot = (delta + zero).clamp(0, 2 * zero - 1)
            # Not those of the ends: buckets about as many as the range are not monotone.
            first, last = slot.min().item(), slot.max().item()
            self._slot_tables[reach, device] = _SlotTable(reach, (slot - first).int(), first, last)
        return self._slot_tables[reach, device]


def _project_content_v1(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (..., num_heads, head_dim), of tokens' hidden states (..., hidden)."""
    heads = attention.num_attention_heads
    q, k, v = attention.in_proj(hidden).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    q = q + attention.q_bias.unflatten(-1, (heads, -1))
    return q, k.contiguous(), v + attention.v_bias.unflatten(-1, (heads, -1))


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


def _project_content_v2(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_project_content_v1``, for v2 and v3."""
    heads = attention.num_attention_heads
    projections = (attention.query_proj, attention.key_proj, attention.value_proj)
    q, k, v = (project(hidden).unflatten(-1, (heads, -1)) for project in projections)
    return q, k, v


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


def _padded_right(model_inputs: dict[str, Tensor], token_index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same rows rolled to their first token, and where the tokens of a flat (batch * tokens) index then are."""
    mask = model_inputs["attention_mask"]
    padding = (mask.cumsum(dim=1) == 0).sum(dim=1)
    tokens = mask.shape[1]
    columns = (torch.arange(tokens, device=mask.device) + padding[:, None]) % tokens
    rolled = {name: value.gather(1, columns) for name, value in model_inputs.items()}
    return rolled, token_index - padding[token_index // tokens]
