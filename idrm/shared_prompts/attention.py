"""A transformers decoder that reads packed pairs: its own layers and attention function, on each pair's parts.

A causal model gives the common beginning of two sequences the same states in both, so that it is read once. Of a pair,
[shared, chosen's own] is one causal sequence; the rows that are rejected's own attend to [shared, rejected's own]. No
mask of the row is ever made, and no pair sees another. Flash attention takes all of it in one call, for its causal mask
is aligned at the end of either length; the others take a few calls, of parts of about one size.

The layout travels as an argument of the model's forward pass down to its attention functions, as transformers passes on
what it does not know, and so reaches activation checkpointing's recomputation too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from idrm.attention_functions import Order, wrap_attention_functions
from idrm.errors import InputError
from idrm.objectives.bottleneck import head_name
from idrm.shared_prompts.packing import PackedPairs

# Their packed rewards are held to those of ordinary rows in tests/idrm/shared_prompts.
MODEL_TYPES = (
    *("gemma", "glm", "gpt2", "gpt_neox", "helium", "llama", "mistral", "olmo", "olmo2", "opt", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3", "starcoder2"),
)
FLASH_IMPLEMENTATIONS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
IMPLEMENTATIONS = ("eager", "sdpa", *FLASH_IMPLEMENTATIONS)
# In the names of the hub's kernels that transformers takes in their place where they are not installed.
FLASH_KERNEL = "flash-attn"


def packed_attention_refusal(config: PreTrainedConfig, implementation: str | None, longest: int) -> str | None:
    """Why a model cannot read packed pairs, None where it can.

    Args:
        config: of the student.
        implementation: its attention implementation, None for transformers' choice.
        longest: tokens of the longest sequence that it will read.
    """
    text = config.get_text_config()
    if text.model_type not in MODEL_TYPES:
        return f"{text.model_type} is none of the models that it was tried with ({', '.join(MODEL_TYPES)})"
    if not is_flash_attention(implementation) and (implementation or "sdpa") not in IMPLEMENTATIONS:
        return f"--attn_implementation {implementation} has no such attention; {', '.join(IMPLEMENTATIONS)} have"
    if is_flash_attention(implementation) and flash_attn_supports_top_left_mask():
        return f"this device's {implementation} aligns causal masks at the beginning"
    window = getattr(text, "sliding_window", None)
    slides = getattr(text, "use_sliding_window", window is not None)
    if slides and window is not None and window < longest:
        return f"its attention slides over {window} tokens, less than --max_length {longest}"
    return None


def is_flash_attention(implementation: str | None) -> bool:
    """Whether it takes sequences of different lengths in one call."""
    return implementation is not None and (implementation in FLASH_IMPLEMENTATIONS or FLASH_KERNEL in implementation)


def read_packed_pairs(model: PreTrainedModel) -> None:
    """Lets a sequence classifier be called with `packed_pairs`, to give the reward of each sequence.

    Its forward pass is what it was for everything else. `model(packed_pairs=packed).logits` is (2B, 1), in the order of
    `packed.sequence_ends`.

    Raises:
        InputError: its reward head is not one linear layer over its decoder's states, or its class is not
            transformers' own, and may compute something else of them.
    """
    try:
        head_name(model)
    except InputError as error:
        raise InputError(f"{type(model).__name__} has no plain reward head") from error
    if not type(model).__module__.startswith("transformers.models."):
        raise InputError(f"{type(model).__name__} is not a class of transformers, and may compute rewards its own way")
    wrap_attention_functions(Order.PACKED_PAIRS, _of_pairs)
    original = model.forward.__func__  # not bound, so that a copy of the model has its own

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, packed_pairs: PackedPairs | None = None, **kwargs: Any) -> Any:
        if packed_pairs is None:
            return original(self, *args, **kwargs)
        states = self.base_model(
            input_ids=packed_pairs.input_ids,
            position_ids=packed_pairs.position_ids,
            # Of four dimensions, it is passed on as it is, and none is made of the whole row; nobody reads it.
            attention_mask=packed_pairs.input_ids.new_zeros(1, 1, 1, 1),
            use_cache=False,
            packed_pairs=packed_pairs,
        ).last_hidden_state
        head = self.get_submodule(head_name(self))
        return SequenceClassifierOutputWithPast(logits=head(states[0].index_select(0, packed_pairs.sequence_ends)))

    model.forward = MethodType(forward, model)


# One for each attention function that is looked up; a few, whatever made them.
@functools.lru_cache(maxsize=64)
def _of_pairs(attention_function: Callable) -> Callable:
    @functools.wraps(attention_function)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_pairs: PackedPairs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_pairs is None:
            return attention_function(module, query, key, value, attention_mask, *args, **kwargs)
        if is_flash_attention(module.config._attn_implementation):
            lengths = packed_pairs.variable_lengths
            query, key, value = (
                tensor.index_select(2, tokens)
                for tensor, tokens in ((query, lengths.rows), (key, lengths.keys), (value, lengths.keys))
            )
            output = attention_function(module, query, key, value, None, *args, **kwargs, **lengths.arguments)[0]
            return output.index_select(1, lengths.restored), None
        needs_masks = module.config._attn_implementation == "eager"
        outputs = []
        for call in packed_pairs.attention_calls:
            part = (_batch(query, call.rows), _batch(key, call.keys), _batch(value, call.keys))
            mask = _additive(call.mask, part[0]) if needs_masks else call.mask
            outputs.append(attention_function(module, *part, mask, *args, **kwargs)[0].flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed_pairs.restored)[None], None

    return attend


def _batch(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of (1, heads, tokens, head_dim) as a batch (parts, heads, longest, head_dim)."""
    return tensor[0].index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """The mask as transformers' eager attention adds it, which knows of causality by no other way."""
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
