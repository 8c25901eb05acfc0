"""Packed rewards and gradients against those of ordinary rows, for every family; no token sees what it must not."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import is_flash_attn_2_available

from idrm.errors import InputError
from idrm.shared_prompts import pack_pairs, packed_attention_refusal, read_packed_pairs
from idrm.shared_prompts.attention import MODEL_TYPES
from tests.idrm.shared_prompts.conftest import padded_rewards


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rewards_and_gradients_are_those_of_ordinary_rows(decoder, pairs, model_type, implementation):
    model = decoder(model_type, implementation).double()
    expected = padded_rewards(model, *pairs)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected @ weights, list(model.parameters()), allow_unused=True)
    assert packed_attention_refusal(model.config, implementation, 64) is None
    read_packed_pairs(model)
    rewards = model(packed_pairs=pack_pairs(*pairs)).logits[:, 0]
    # Rotary angles and norms are float32 in many families, and round alike.
    torch.testing.assert_close(rewards, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(rewards @ weights, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    # What it was called with before, it still takes.
    torch.testing.assert_close(padded_rewards(model, *pairs), expected, rtol=0, atol=0)


def bottom_right_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """What flash_attn_varlen_func computes, by its documentation: (tokens, heads, head_dim) of several sequences."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_seqlens_q), itertools.pairwise(cu_seqlens_k), strict=True):
        assert b - a <= max_seqlen_q
        assert d - c <= max_seqlen_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int(d - c - (b - a)))
        own = (tensor.transpose(0, 1) for tensor in (q[a:b], k[c:d], v[c:d]))
        output = F.scaled_dot_product_attention(*own, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash_attention(monkeypatch):
    """Transformers' flash attention down to the kernel, which is stood in for."""
    settings = dict.fromkeys(("dropout_p", "window_size", "deterministic", "softcap", "s_aux", "learnable_sink"), False)
    settings |= dict.fromkeys(("block_table", "page_table", "cache_seqlens"), False)
    settings |= {"max_seqlen_q": True, "max_seqlen_k": True}
    process = functools.partial(flash._process_flash_attention_kwargs, supports_mapping=settings)
    functions = (None, bottom_right_attention, None, None, None), (process, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda implementation: functions)


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_flash_attention_takes_all_in_one_call(decoder, pairs, model_type):
    model = decoder(model_type).double()
    weights = torch.linspace(-1, 1, 2 * len(pairs[0]), dtype=torch.float64)
    expected = padded_rewards(model, *pairs)
    expected_gradients = torch.autograd.grad(expected @ weights, list(model.parameters()), allow_unused=True)
    read_packed_pairs(model)
    model.config._attn_implementation = "flash_attention_2"
    rewards = model(packed_pairs=pack_pairs(*pairs)).logits[:, 0]
    torch.testing.assert_close(rewards, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(rewards @ weights, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn and a GPU that it takes are not here")
def test_flash_attention_itself(decoder, pairs):
    model = decoder("llama").cuda()
    expected = padded_rewards(model, *pairs)
    read_packed_pairs(model)
    model.bfloat16().config._attn_implementation = "flash_attention_2"
    rewards = model(packed_pairs=pack_pairs(*pairs).to("cuda")).logits[:, 0]
    assert (rewards.float() - expected).norm() < 0.03 * expected.norm()


def test_no_token_sees_another_pair_nor_the_other_response(decoder, pairs):
    """To the bit: whatever else stands in the row, a reward depends on its own sequence."""
    model = decoder("llama")
    read_packed_pairs(model)
    chosen, rejected = pairs
    with torch.no_grad():
        before = model(packed_pairs=pack_pairs(chosen, rejected)).logits.view(2, -1)
        for index, (first, second) in enumerate(zip(chosen, rejected, strict=True)):
            for segment, own in enumerate((first, second)):
                shared = pack_pairs([first], [second]).pairs[0].shared
                changed = [list(chosen), list(rejected)]
                # Another token of a response, or of the prompt, which both have.
                for position in range(len(own)):
                    other = (own[position] + 1 - 3) % 47 + 3 if segment == 0 else (own[position] + 1 - 50) % 50 + 50
                    for side in (0, 1) if position < shared else (segment,):
                        sequence = list((first, second)[side])
                        sequence[position] = other
                        changed[side][index] = sequence
                    after = model(packed_pairs=pack_pairs(*changed)).logits.view(2, -1)
                    moved = after != before
                    expected = torch.zeros_like(moved)
                    expected[(0, 1) if position < shared else segment, index] = True
                    assert not (moved & ~expected).any()
                    changed = [list(chosen), list(rejected)]
                assert moved.any()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_activation_checkpointing_recomputes_the_same(decoder, pairs, model_type):
    packed = pack_pairs(*pairs)
    gradients = []
    for checkpointing in (False, True):
        model = decoder(model_type).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        read_packed_pairs(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rewards = model(packed_pairs=packed).logits[:, 0]
        rewards.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_which_models_are_refused():
    config = LlamaConfig()
    assert packed_attention_refusal(config, None, 4096) is None
    assert packed_attention_refusal(config, "flash_attention_2", 4096) is None
    assert packed_attention_refusal(config, "kernels-community/flash-attn2", 4096) is None
    assert "flex_attention has no such attention; eager, sdpa" in packed_attention_refusal(config, "flex_attention", 64)
    config.model_type = "mamba"
    assert packed_attention_refusal(config, None, 64).startswith("mamba is none of the models that it was tried with")
    config.model_type = "mistral"
    config.sliding_window = 1024
    assert packed_attention_refusal(config, None, 1024) is None
    assert "slides over 1024 tokens, less than --max_length 1025" in packed_attention_refusal(config, None, 1025)
    # Qwen2 has a window that it does not use.
    config.use_sliding_window = False
    assert packed_attention_refusal(config, None, 4096) is None


class Sigmoid(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sigmoid()
        return output


def test_a_model_with_a_forward_pass_of_its_own_is_refused(decoder):
    with pytest.raises(InputError, match="Sigmoid is not a class of transformers, and may compute rewards its own way"):
        read_packed_pairs(Sigmoid(decoder("llama").config))


def test_a_copy_reads_by_its_own_weights(decoder, pairs):
    model = decoder("llama")
    read_packed_pairs(model)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.score.weight)
    assert not padded_rewards(copied, *pairs).any()
    assert not copied(packed_pairs=pack_pairs(*pairs)).logits.any()
    assert padded_rewards(model, *pairs).all()


def test_a_model_without_a_plain_head_is_refused(decoder):
    model = decoder("llama")
    model.score = torch.nn.Sequential(model.score)
    with pytest.raises(InputError, match="LlamaForSequenceClassification has no plain reward head"):
        read_packed_pairs(model)
