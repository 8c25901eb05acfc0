"""Pairs in one row, each prompt in it once: layout, attention, which models can read them, how many are a batch."""

from idrm.shared_prompts.attention import packed_attention_refusal, read_packed_pairs
from idrm.shared_prompts.packing import PackedPairs, pack_pairs, packed_length
from idrm.shared_prompts.token_batches import TokenBatches, TokenBatchSampler

__all__ = [
    "PackedPairs",
    "TokenBatchSampler",
    "TokenBatches",
    "pack_pairs",
    "packed_attention_refusal",
    "packed_length",
    "read_packed_pairs",
]
