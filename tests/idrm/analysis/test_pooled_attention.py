"""The pooled token's attention is that of transformers' own maps, whatever the model does to its scores."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from idrm.analysis.pooled_attention import PooledAttention
from idrm.errors import InputError

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=4),
    "gemma2, capped": Gemma2Config(**GROUPED, head_dim=16, sliding_window=4, attn_logit_softcapping=1.0),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4),
    "gpt_neox": GPTNeoXConfig(**SIZES, num_attention_heads=4, num_labels=1),
}


def build(config, implementation="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        copy.deepcopy(config), attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def batch():
    """Three sequences, one of them padded on the right, with a front or a middle masked; and where they end."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 8:] = 0
    input_ids = torch.randint(1, 50, (3, 11), generator=generator) * mask
    mask[1, :3] = 0
    mask[2, 4:9] = 0
    return input_ids, mask, torch.tensor([10, 7, 10])


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, how) for name in CONFIGS for how in ("eager", "sdpa") if (name, how) != ("gemma2, capped", "sdpa")],
)
def test_attention_and_rewards_are_those_of_transformers_eager_maps(name, implementation, layer, batch):
    input_ids, mask, pooled = batch
    with torch.no_grad():
        expected = build(CONFIGS[name], "eager")(
            input_ids=input_ids, attention_mask=mask, output_attentions=True, use_cache=False
        )
    rewards, attention = PooledAttention(build(CONFIGS[name], implementation), layer)(input_ids, mask)
    rows = expected.attentions[layer][torch.arange(3), :, pooled].mean(dim=1)
    torch.testing.assert_close(attention, rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards, expected.logits[:, 0], rtol=1e-4, atol=1e-4)
    assert (attention[mask == 0] == 0).all()
    uniform = (rows > 0) / (rows > 0).sum(dim=1, keepdim=True)
    assert (rows - uniform).abs().max() > 0.01  # far beyond the tolerance: an error would show


def test_positions_stay_where_a_model_would_count_what_the_mask_leaves(batch):
    size = {"vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    model = build(OPTConfig(**size, num_attention_heads=4, pad_token_id=0, num_labels=1))
    input_ids, mask = batch[0][:1], torch.ones(1, 11, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        kept = model(input_ids=input_ids, attention_mask=mask, position_ids=torch.arange(11)[None]).logits
        moved = model(input_ids=input_ids, attention_mask=mask).logits
    assert (kept - moved).abs() > 1e-3
    torch.testing.assert_close(PooledAttention(model)(input_ids, mask)[0], kept[:, 0])


def test_what_cannot_be_formed_from_queries_and_keys_is_refused():
    with pytest.raises(InputError, match="BertForSequenceClassification: is an encoder"):
        PooledAttention(build(BertConfig(**SIZES, num_attention_heads=4, num_labels=1)))
    sinks = GptOssConfig(**GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(InputError, match="layer 2 has attention sinks"):
        PooledAttention(build(sinks, "eager"))
    chunked = build(LlamaConfig(**GROUPED))
    chunked.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(InputError, match="layer 2 has chunked_attention; expected full or sliding attention"):
        PooledAttention(chunked)
    with pytest.raises(InputError, match="layer 3 is beyond the model's depth"):
        PooledAttention(build(LlamaConfig(**GROUPED)), 3)
