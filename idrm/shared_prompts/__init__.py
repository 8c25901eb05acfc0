"""Pairs in one row, each prompt in it once: how they are laid out, how they attend, which models can read them."""

from idrm.shared_prompts.attention import packed_attention_refusal, read_packed_pairs
from idrm.shared_prompts.packing import PackedPairs, pack_pairs

__all__ = ["PackedPairs", "pack_pairs", "packed_attention_refusal", "read_packed_pairs"]
