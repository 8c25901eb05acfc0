"""Captured queries and keys are those of the model's own attention, with its own gradient."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from idrm.capture import QueryKeyCapture, check_supported, resolve_layers
from idrm.errors import InputError

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16, sliding_window=4, attn_logit_softcapping=None),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4),
    "gpt_neox": GPTNeoXConfig(**SIZES, num_attention_heads=4),
}


def build(config, implementation="sdpa", auto_class=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    model = auto_class.from_config(copy.deepcopy(config), attn_implementation=implementation).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(autouse=True)
def softmax_without_rounding(monkeypatch):
    """Eager decoders take the softmax in float32, to which a float64 mask is -inf; here it stays in float64."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, :1] = 0
    input_ids = torch.randint(1, 50, (3, 11), generator=generator) * mask
    return {"input_ids": input_ids, "attention_mask": mask}


def captured(model, layers, batch, runner=None):
    capture = QueryKeyCapture(model, layers)
    with capture.recording():
        (runner or model)(**batch)
    return capture.take()


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, how) for name in CONFIGS for how in ("eager", "sdpa") if (name, how) != ("gemma2", "sdpa")],
)
def test_captured_query_and_key_give_the_models_own_attention(name, implementation, batch):
    layers = range(CONFIGS[name].num_hidden_layers)
    with torch.no_grad():
        expected = build(CONFIGS[name], "eager", AutoModel).eval()(**batch, output_attentions=True).attentions
        model = build(CONFIGS[name], implementation, AutoModel).eval()
        blocks = captured(model, layers, batch)
    keys_seen = batch["attention_mask"].bool()
    position = torch.arange(keys_seen.shape[1])
    distance = position[:, None] - position[None, :]
    for layer in layers:
        block = blocks[layer]
        key = block.key.repeat_interleave(block.query.shape[1] // block.key.shape[1], dim=1)
        scores = block.query @ key.mT * block.softmax_scale
        allowed = (distance >= 0) & keys_seen[:, None, None, :]
        window = getattr(model.config, "sliding_window", None)
        kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * len(layers)
        if window is not None and kinds[layer] == "sliding_attention":
            allowed &= distance < window
        probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        rows = keys_seen[:, None, :].expand(probabilities.shape[:3])
        torch.testing.assert_close(probabilities[rows], expected[layer][rows], rtol=0, atol=1e-10)
        assert expected[layer][rows].max(dim=-1).values.mean() > 0.3  # far from uniform, so that an error would show


def test_shapes_and_negative_layers(batch):
    model = build(CONFIGS["llama"]).eval()
    blocks = captured(model, [-1, 0], batch)
    assert set(blocks) == {2, 0}
    assert blocks[2].query.shape == (3, 4, 11, 8)
    assert blocks[2].key.shape == (3, 2, 11, 8)
    assert blocks[2].softmax_scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_recording_changes_no_output(implementation, batch):
    model = build(CONFIGS["llama"], implementation).eval()
    before = model(**batch).logits
    capture = QueryKeyCapture(model, [-1])
    with capture.recording():
        during = model(**batch).logits
    after = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def test_another_model_inside_the_recording_is_not_captured(batch):
    model = build(CONFIGS["llama"]).eval()
    other = build(CONFIGS["llama"]).eval()
    alone = captured(model, [-1], batch)[2].query
    capture = QueryKeyCapture(model, [-1])
    with capture.recording():
        other(input_ids=batch["input_ids"].flip(0), attention_mask=batch["attention_mask"].flip(0))
        model(**batch)
        other(**batch)
    assert torch.equal(capture.take()[2].query, alone)


def test_two_captures_may_be_nested(batch):
    outer_model, inner_model = build(CONFIGS["llama"]).eval(), build(CONFIGS["qwen2"]).eval()
    outer, inner = QueryKeyCapture(outer_model, [0]), QueryKeyCapture(inner_model, [1])
    with outer.recording():
        with inner.recording():
            inner_model(**batch)
        outer_model(**batch)
    assert set(outer.take()) == {0}
    assert set(inner.take()) == {1}


def test_a_wrapper_may_be_called_in_place_of_the_model(batch):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model = build(CONFIGS["llama"])
    blocks = captured(model, [-1], batch, runner=Wrapper(model))
    assert blocks[2].query.requires_grad


def test_each_recording_starts_afresh_and_take_empties(batch):
    model = build(CONFIGS["llama"]).eval()
    capture = QueryKeyCapture(model, [-1])
    flipped = {name: tensor.flip(0) for name, tensor in batch.items()}
    with capture.recording():
        model(**flipped)
    with capture.recording():
        model(**batch)
    assert torch.equal(capture.take()[2].query, captured(model, [-1], batch)[2].query)
    with pytest.raises(RuntimeError, match="nothing to take"):
        capture.take()


def test_two_forward_passes_in_one_recording_are_an_error(batch):
    model = build(CONFIGS["llama"]).eval()
    capture = QueryKeyCapture(model, [-1])

    def run_twice():
        with capture.recording():
            model(**batch)
            model(**batch)

    with pytest.raises(RuntimeError, match="layer 2 called its attention twice"):
        run_twice()
    with pytest.raises(RuntimeError, match="nothing to take"):
        capture.take()


def test_a_recording_without_the_model_is_an_error(batch):
    capture = QueryKeyCapture(build(CONFIGS["llama"]), [0, -1])
    with pytest.raises(InputError, match=r"layers \[0, 2\] under attention implementation 'sdpa'"), capture.recording():
        build(CONFIGS["llama"])(**batch)


def test_an_attention_past_the_interface_is_an_error(batch):
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(InputError, match=r"layers \[1\] under attention implementation 'eager'"):
        captured(model, [-1], batch)


def enable_checkpointing(model, use_reentrant):
    """Under the name of transformers from 5.18, or the one before, which is deprecated by now."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def loss_on_captured(model, batch, backward_inside=False):
    """A loss on rewards and captured tensors; returns every parameter's gradient."""
    capture = QueryKeyCapture(model, [-1, 0])
    model.zero_grad()
    with capture.recording():
        rewards = model(**batch).logits
        if backward_inside:
            rewards.square().sum().backward(retain_graph=True)
            model.zero_grad()
    interaction = sum(
        (block.query.square().mean(dim=1) @ block.key.cos().mean(dim=1).mT).sin().sum()
        for block in capture.take().values()
    )
    (rewards.square().sum() + interaction).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_compiled_model_is_captured_and_recompiled_by_itself(batch):
    model = build(CONFIGS["llama"]).train()
    capture = QueryKeyCapture(model, [-1])
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)
    with capture.recording():
        compiled(**batch)
    query = capture.take()[2].query
    torch.testing.assert_close(query, captured(model, [-1], batch)[2].query, rtol=0, atol=1e-12)
    query.square().sum().backward()
    assert model.model.layers[2].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.model.layers[2].self_attn.o_proj.weight.grad is None


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_checkpointing_gives_the_gradient_of_no_checkpointing(implementation, backward_inside, batch):
    model = build(CONFIGS["llama"], implementation).train()
    expected = loss_on_captured(model, batch)
    enable_checkpointing(model, use_reentrant=False)
    checkpointed = loss_on_captured(model, batch, backward_inside)
    assert expected["model.layers.2.self_attn.k_proj.weight"].abs().max() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-12 * gradient.abs().max().item())


def test_reentrant_checkpointing_is_refused_when_known(batch):
    model = build(CONFIGS["llama"]).train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(InputError, match="expected use_reentrant=False"):
        check_supported(model)
    with pytest.raises(InputError, match="expected use_reentrant=False"):
        QueryKeyCapture(model, [-1])


def test_reentrant_checkpointing_enabled_later_is_an_error_of_the_recording(batch):
    model = build(CONFIGS["llama"]).train()
    capture = QueryKeyCapture(model, [-1, 0])
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(InputError, match=r"layers \[0, 2\] carry no gradient"), capture.recording():
        model(**batch)


def test_frozen_layers_are_an_error_in_training_only(batch):
    model = build(CONFIGS["llama"]).requires_grad_(False).train()
    with pytest.raises(InputError, match=r"layers \[2\] carry no gradient"):
        captured(model, [-1], batch)
    with torch.no_grad():
        assert set(captured(model, [-1], batch)) == {2}
    assert set(captured(model.eval(), [-1], batch)) == {2}


def test_an_unknown_attention_implementation_is_refused():
    model = build(CONFIGS["llama"])
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(InputError, match="'flex_attention' is unknown; expected one of eager, sdpa, flash_attention_2"):
        check_supported(model)


def test_flash_attention_is_seen_under_its_own_name(batch, monkeypatch):
    """No flash-attn here: its entry is filled in, and called, by the name it is configured under."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import AttentionInterface

    called = []

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        called.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in)
    model = build(CONFIGS["llama"]).eval()
    expected = captured(model, [0], batch)[0]
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(captured(model, [0], batch)[0].key, expected.key)
    assert called == ["flash_attention_2"] * 3


def test_resolve_layers():
    assert resolve_layers([-1, 0, 2, -1], 3, "student") == (2, 0, 2, 2)
    for beyond in (3, -4):
        with pytest.raises(InputError, match=rf"teacher: layer {beyond} is beyond .* expected -3..2"):
            resolve_layers([0, beyond], 3, "teacher")
    with pytest.raises(InputError, match="student: expected at least one layer"):
        resolve_layers([], 3, "student")


def test_layers_beyond_the_students_depth():
    with pytest.raises(InputError, match="student: layer -4 is beyond the model's depth"):
        QueryKeyCapture(build(CONFIGS["llama"]), [-4])
