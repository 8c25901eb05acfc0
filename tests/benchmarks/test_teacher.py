"""The teacher's contests: what they compare, and that wrong results get no number."""

import dataclasses

import pytest
import torch

from benchmarks import teacher
from benchmarks.teacher import HALF, TeacherContest
from idrm.capture import deberta


@pytest.fixture
def tiny(monkeypatch):
    """tiny(shape): a contest of six blocks and width 32; ModernBERT's are all global, so that any can be supervised."""

    def contest(shape):
        kind, fields = teacher.SHAPES[shape]
        small = {**fields, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 1000}
        if shape == "modernbert-large":
            special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
            small |= {**special, "global_attn_every_n_layers": 1}
        monkeypatch.setitem(teacher.SHAPES, shape, (kind, small))
        return TeacherContest("cpu", "float32", shape, 40, 6, 24)

    teacher._model.cache_clear()
    yield contest
    teacher._model.cache_clear()


@pytest.mark.parametrize(
    ("shape", "variants"), [("deberta-large", ("eager", "sdpa", HALF)), ("modernbert-large", ("eager", "sdpa"))]
)
def test_variants_agree(tiny, shape, variants):
    contest = tiny(shape)
    results = {name: call() for name, call in contest.variants(variants).items()}
    torch.testing.assert_close(results["eager"], results["sdpa"])
    assert {result.shape for result in results.values()} == {(78, 2, 16)}
    if HALF in variants:
        assert (results["sdpa"] - results[HALF]).abs().max() > 0.01
    assert [contest.check(name) for name in variants] == [None] * len(variants)
    assert [contest.check_result(name, result) for name, result in results.items()] == [None] * len(variants)


def test_half_depth_runs_half_the_blocks(tiny):
    contest, ran = tiny("deberta-large"), []
    for layer, block in enumerate(teacher._model(contest, False).encoder.layer):
        block.register_forward_pre_hook(lambda *arguments, layer=layer: ran.append(layer))
    calls = contest.variants(("sdpa", HALF))
    calls["sdpa"]()
    assert ran == [0, 1, 2, 3, 4, 5]
    ran.clear()
    calls[HALF]()
    assert ran == [0, 1, 2]


def test_weights_are_held_once(tiny):
    contest = tiny("deberta-large")
    weights = {parameter.data_ptr() for parameter in teacher._model(contest, False).parameters()}
    call = contest._call("eager", 5)
    (owner,) = [cell.cell_contents for cell in call.__closure__ if hasattr(cell.cell_contents, "attention")]
    assert {parameter.data_ptr() for parameter in owner._model.parameters()} == weights


def test_a_wrong_attention_gets_no_number(tiny, monkeypatch):
    contest, right = tiny("deberta-large"), deberta.sdpa_in_row_chunks
    monkeypatch.setattr(deberta, "sdpa_in_row_chunks", lambda *args, **options: 1.01 * right(*args, **options))
    assert contest.check("sdpa").startswith("queries of cpu-float32-deberta-large-4-layers-2x40 are off by")
    monkeypatch.setattr(deberta, "sdpa_in_row_chunks", lambda *args, **options: 0 * right(*args, **options))
    (call,) = contest.variants(("sdpa",)).values()
    assert "of their norm" in contest.check_result("sdpa", call())


def test_an_attention_that_knows_no_log_buckets_gets_no_number(tiny, monkeypatch):
    contest, right = dataclasses.replace(tiny("deberta-large"), length=200), deberta.sdpa_in_row_chunks

    def linear(*args, slot_of_delta, **options):
        tokens = len(slot_of_delta) // 2
        slots = torch.arange(-tokens, tokens + 1) + int(slot_of_delta[tokens])
        return right(*args, slot_of_delta=slots.clamp(0, int(slot_of_delta.max())), **options)

    monkeypatch.setattr(deberta, "sdpa_in_row_chunks", linear)
    assert "are off by" in contest.check("sdpa")


def test_an_implementation_that_is_not_there_gets_no_number(tiny):
    contest = dataclasses.replace(tiny("deberta-large"), dtype="bfloat16")
    assert teacher._model(contest, False).dtype == torch.bfloat16
    assert "'flashdeberta' " in contest.check("flashdeberta")
