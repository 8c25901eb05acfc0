"""The two sides of a distillation: an attention that is defined but never materialised, or maps computed elsewhere."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from idrm_kernels.layout import check_mask


@dataclasses.dataclass(frozen=True, eq=False)
class DisentangledBias:
    """Position bias of a DeBERTa-like teacher (DESIGN section 2.2), linear in the number of tokens.

    Adds ``c2p[i, h, slot(pos_i - pos_j)] + p2c[j, h, slot(pos_i - pos_j)]`` to the score of query i and key j, where
    ``slot(delta) = slot_of_delta[clamp(delta, -max_delta, max_delta) + max_delta]``.

    Attributes:
        positions: (total_tokens,) int32, position of each token in the teacher's joint input, specials counted.
        slot_of_delta: (2 * max_delta + 1,) int32, the slot of each position difference; differences beyond clamp.
        c2p: (total_tokens, num_heads, num_slots), q's dtype or float32, already scaled; None where there is none.
        p2c: the same for position-to-content, indexed by the key token.
    """

    positions: Tensor
    slot_of_delta: Tensor
    c2p: Tensor | None
    p2c: Tensor | None

    def detach(self) -> DisentangledBias:
        """The same bias outside of autograd."""
        c2p, p2c = (None if table is None else table.detach() for table in (self.c2p, self.p2c))
        return dataclasses.replace(self, c2p=c2p, p2c=p2c)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedAttention:
    """One model's attention over the content tokens of a batch, packed without padding; never materialised.

    Attributes:
        q: (total_tokens, num_heads, head_dim), float32, bfloat16, float16 (float64 off the GPU), after RoPE.
        k: (total_tokens, num_kv_heads, head_dim), same dtype; num_kv_heads divides num_heads.
        softmax_scale: factor of q.k; None is 1 / sqrt(head_dim).
        position_bias: a teacher's DisentangledBias; must be None for a student.
        causal: keys j <= i only; needs a layout with segments = 1.
    """

    q: Tensor
    k: Tensor
    softmax_scale: float | None = None
    position_bias: DisentangledBias | None = None
    causal: bool = False

    @classmethod
    def from_padded(cls, q: Tensor, k: Tensor, mask: Tensor, **fields) -> PackedAttention:
        """Packs (B, H, N, D) queries and (B, Hkv, N, D) keys by a (B, N) bool mask of the tokens that take part.

        Differentiable in q and k. The order is row after row, which is the order of ``MapLayout.from_mask(mask)``.
        ``fields`` are the remaining attributes. Reads the mask once, which synchronises with an accelerator. Raises
        TypeError or ValueError for a mask of another dtype or shape.
        """
        check_mask(mask)
        for name, tensor in (("q", q), ("k", k)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != tuple(mask.shape):
                raise ValueError(
                    f"{name}: expected shape (batch, heads, tokens, head_dim) with batch and tokens of the mask "
                    f"{tuple(mask.shape)}, got {tuple(tensor.shape)}"
                )
        tokens = mask.nonzero(as_tuple=True)
        return cls(q=q.transpose(1, 2)[tokens], k=k.transpose(1, 2)[tokens], **fields)

    @property
    def scale(self) -> float:
        """softmax_scale, with its default filled in."""
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else float(self.softmax_scale)

    def detach(self) -> PackedAttention:
        """The same attention outside of autograd."""
        bias = None if self.position_bias is None else self.position_bias.detach()
        return dataclasses.replace(self, q=self.q.detach(), k=self.k.detach(), position_bias=bias)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMaps:
    """Teacher maps computed elsewhere: at unit level, head-averaged within the groups, normalised; used as they are.

    Attributes:
        maps: (num_examples, num_head_groups, max_units, max_units), float32, bfloat16 or float16, zero padded. Rows and
            columns are the units of the whole example, segment after segment; max_units is ``MapLayout.max_units``.
    """

    maps: Tensor

    def detach(self) -> StoredMaps:
        """The same maps outside of autograd."""
        return StoredMaps(self.maps.detach())
