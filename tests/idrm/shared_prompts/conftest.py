"""Pairs of token ids of every kind of common beginning, and small decoders of many families."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

VOCABULARY = 100
# What a family's configuration calls its sizes, where it is not as Llama's; and what else it needs to be small.
OTHER_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    **{name: {"head_dim": 8} for name in ("gemma", "glm", "helium", "qwen3")},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def random_pairs(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Chosen and rejected: a common prompt, none, all of chosen, all of rejected, all but one token, a long one."""
    source = random.Random(seed)

    def tokens(count: int, low: int, high: int) -> list[int]:
        return [source.randrange(low, high) for _ in range(count)]

    chosen, rejected = [], []
    for shared, first, second in ((20, 7, 9), (0, 5, 6), (12, 0, 4), (12, 4, 0), (1, 1, 1), (30, 15, 2)):
        prompt = tokens(shared, 3, VOCABULARY)
        # No token of one response is one of the other: what is common ends with the prompt.
        chosen.append(prompt + tokens(first, 3, 50))
        rejected.append(prompt + tokens(second, 50, VOCABULARY))
    return chosen, rejected


@pytest.fixture
def pairs():
    return random_pairs()


@pytest.fixture(scope="session")
def decoder():
    """decoder(model_type, implementation): a small sequence classifier with distinct attention, in evaluation."""

    def make(model_type: str, implementation: str = "sdpa", **values):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        if model_type not in ("gpt2", "gpt_neox", "opt", "phi"):
            sizes["num_key_value_heads"] = 2
        sizes |= {"max_position_embeddings": 128} | OTHER_SIZES.get(model_type, {})
        common = {"vocab_size": VOCABULARY, "num_labels": 1, "initializer_range": 0.2, **TOKENS}
        config = AutoConfig.for_model(model_type, **{**common, **sizes, **values})
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation).eval()

    return make


def padded_rewards(model, chosen, rejected):
    """Rewards (2B,) of ordinary rows, padded on the right."""
    sequences = [*chosen, *rejected]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=model.device)
    mask = (
        torch.arange(longest, device=model.device)
        < torch.tensor(list(map(len, sequences)), device=model.device)[:, None]
    )
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]
