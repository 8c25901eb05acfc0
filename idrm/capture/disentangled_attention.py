"""DeBERTa's self-attention for long inputs: its output without a (heads, tokens, tokens) tensor.

transformers holds several of them for every block. Here DeBERTa's score (DESIGN section 2.2) with its terms

    c2p[i, j] = q_i.pos_key[slot(i - j)]    p2c[i, j] = k_j.pos_query[slot(i - j)]

is taken into torch's attention as a bias, for a chunk of query rows at a time, on any device; or the kernel of the
flashdeberta package computes it on a GPU. Measured on two CPU cores, for one example of 2048 tokens, 16 heads of size
64 and 512 slots in float32: a block's attention takes 0.3 s in chunks and 1.1 s as transformers computes it; torch's
flex_attention takes 0.3 s where it is compiled, which asks for a compiler and 9 s, and 1.6 s where it is not.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

logger = logging.getLogger(__name__)

# Of the bias of a chunk's rows; the two terms that it is the sum of are held at once.
WORKSPACE_BYTES = 32 << 20
FLASHDEBERTA_DTYPES = (torch.bfloat16, torch.float16)


def sdpa_in_row_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    softmax_scale: float,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    slot_of_delta: Tensor | None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """The output of disentangled attention, from torch's attention over some query rows and their bias at a time.

    Beside the inputs and the output it holds a few tensors of ``workspace_bytes`` (or one row of all heads of an
    example): both terms, the slots as int64, and in half precision on a CPU a copy of the bias; and for p2c one of
    (examples of a chunk, num_heads, num_slots, tokens).

    Args:
        q, k, v: (batch, tokens, num_heads, head_dim).
        mask: (batch, tokens) bool, True at the keys that are read, of which each example has one at least.
        softmax_scale: factor of all three terms.
        pos_key, pos_query: (num_slots, num_heads, head_dim) position embeddings of c2p and p2c; None leaves a term out.
        slot_of_delta: (2 * max_delta + 1,) int, entry [delta + max_delta], max_delta >= tokens - 1; for either term.

    Returns (batch, tokens, num_heads, head_dim) in q's dtype.
    """
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    if pos_key is None and pos_query is None:
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], scale=softmax_scale)
        return output.transpose(1, 2)
    batch, heads, tokens, _ = q.shape
    num_slots = 0 if pos_key is None else len(pos_key)
    fitting_rows = max(1, workspace_bytes // (heads * max(tokens, num_slots) * q.element_size()))
    some_rows, some_examples = min(fitting_rows, tokens), max(1, fitting_rows // tokens)
    max_delta = len(slot_of_delta) // 2
    positions = torch.arange(tokens, device=q.device)
    c2p_columns = None if pos_key is None else (pos_key * softmax_scale).permute(1, 2, 0)
    p2c_rows = None if pos_query is None else (pos_query * softmax_scale).transpose(0, 1)
    output = torch.empty_like(q)
    for first in range(0, batch, some_examples):
        examples = slice(first, first + some_examples)
        # Slots before tokens: neighbouring keys of a row mostly share a slot, and are then read side by side.
        p2c = None if p2c_rows is None else p2c_rows @ k[examples].transpose(-1, -2)
        for start in range(0, tokens, some_rows):
            rows = slice(start, start + some_rows)
            queries = q[examples, :, rows]
            slots = slot_of_delta[positions[rows, None] - positions + max_delta].long()
            slots = slots.expand(queries.shape[0], heads, -1, -1)
            bias = None
            if c2p_columns is not None:
                bias = (queries @ c2p_columns).gather(-1, slots)
            if p2c is not None:
                term = p2c.gather(-2, slots)
                bias = term if bias is None else bias.add_(term)
            bias.masked_fill_(~mask[examples, None, None, :], -torch.inf)
            output[examples, :, rows] = scaled_dot_product_attention(
                queries, k[examples], v[examples], attn_mask=bias, scale=softmax_scale
            )
    return output.transpose(1, 2)


def flashdeberta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    softmax_scale: float,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    position_buckets: int,
    max_relative_positions: int,
) -> Tensor:
    """The same by the flashdeberta package, on a GPU.

    Args:
        mask: as above; padding stands on the right.
        pos_key, pos_query: embeddings of all slots, which are found from the next two as DeBERTa does.
    """
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    output = flash_attention_with_disentangled(
        *(heads.transpose(1, 2) for heads in (q, k, v)),
        mask.sum(dim=1, dtype=torch.int32),
        *(None if position is None else position.transpose(0, 1)[None] for position in (pos_key, pos_query)),
        causal=False,
        sm_scale=softmax_scale,
        position_buckets=position_buckets,
        max_relative_distance=max_relative_positions,
    )
    return output.transpose(1, 2)


@functools.cache
def flashdeberta_obstacle(dtype: torch.dtype, head_dim: int, device: torch.device | None = None) -> str | None:
    """Why flashdeberta cannot compute heads of this size and dtype, on this device if one is named; None if it can.

    On a device it is held to small problems first: its releases have changed the meaning of arguments, and its kernel
    is compiled for the GPU at hand.
    """
    if importlib.util.find_spec("flashdeberta") is None:
        return "is not installed: pip install 'idrm[flashdeberta]'"
    if dtype not in FLASHDEBERTA_DTYPES:
        return f"computes in bfloat16 or float16, and the teacher is in {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return "needs a GPU"
    if device is None:
        return None
    obstacle = _wrong_on_a_small_problem(dtype, head_dim, device)
    if obstacle is not None:
        logger.warning("flashdeberta %s", obstacle)
    return obstacle


def _wrong_on_a_small_problem(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """What is wrong with its results, by the rule that kernels are held to: twice the error of torch in this dtype."""
    generator = torch.Generator(device).manual_seed(0)
    reach, tokens = 64, 80

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, head_dim, generator=generator, device=device).to(dtype)

    q, k, v = (normal(2, tokens) for _ in range(3))
    mask = torch.arange(tokens, device=device) < torch.tensor([[tokens], [37]], device=device)
    delta = torch.arange(-tokens, tokens + 1, device=device)
    for buckets, terms in ((-1, 2), (16, 2), (16, 1), (16, 0)):
        zero = buckets if buckets > 0 else reach
        slots = make_log_bucket_position(delta, buckets, reach).long() if buckets > 0 else delta
        slot_of_delta = (slots + zero).clamp(0, 2 * zero - 1)
        pos_key, pos_query = normal(2 * zero), normal(2 * zero)
        positions = {"pos_key": None if terms == 1 else pos_key, "pos_query": None if terms == 0 else pos_query}
        scale = (3 * head_dim) ** -0.5

        def chunked(compute: torch.dtype, positions=positions, slot_of_delta=slot_of_delta, scale=scale) -> Tensor:
            inputs = (tensor.to(compute) for tensor in (q, k, v))
            cast = {name: table if table is None else table.to(compute) for name, table in positions.items()}
            return sdpa_in_row_chunks(*inputs, mask, softmax_scale=scale, slot_of_delta=slot_of_delta, **cast)[mask]

        try:
            ranges = {"position_buckets": buckets, "max_relative_positions": reach}
            result = flashdeberta(q, k, v, mask, softmax_scale=scale, **positions, **ranges)[mask].double()
        except torch.OutOfMemoryError:
            raise  # says nothing of the kernel
        except Exception as error:  # whatever keeps a foreign kernel from running here
            return f"fails here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        exact = chunked(torch.float64)
        own = (chunked(dtype).double() - exact).abs().max().item()
        bound = 2 * (own + torch.finfo(dtype).eps * exact.abs().max().item())
        error = (result - exact).abs().max().item()
        if not error <= bound:
            return f"is off by {error:.2g} here, expected at most {bound:.2g}"
    return None
