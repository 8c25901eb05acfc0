"""The ladder of a training step."""

import dataclasses

import pytest
import torch

from benchmarks import teacher, training_step
from benchmarks.training_step import LADDER, StepContest


def test_a_teacher_of_debertas_shape_is_read(tiny, monkeypatch):
    kind, fields = teacher.SHAPES["deberta-large"]
    small = {**fields, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setitem(teacher.SHAPES, "deberta-large", (kind, small))
    contest = dataclasses.replace(tiny, teacher="deberta-large")
    losses = {name: call() for name, call in contest.variants(("fused", "naive")).items()}
    torch.testing.assert_close(losses["fused"], losses["naive"])


@pytest.fixture
def tiny(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(training_step.STUDENTS, "tiny", {**shape, "vocab_size": 1000})
    training_step._models.cache_clear()
    yield StepContest("cpu", "float32", "tiny", "minilm", 50, 2, 2)
    training_step._models.cache_clear()


def test_every_rung_adds_what_it_says(tiny):
    losses = {name: call() for name, call in tiny.variants(LADDER).items()}
    assert losses["bradley-terry"] == losses["capture"] == losses["teacher"]
    assert losses["fused"] > losses["teacher"]
    torch.testing.assert_close(losses["fused"], losses["naive"])
    torch.testing.assert_close(losses["cached"], losses["naive"], rtol=1e-3, atol=0)
    assert losses["cached"] != losses["fused"]  # through bfloat16
    for variant in ("fused", "cached"):
        assert tiny.check(variant) is None
        assert tiny.check_result(variant, losses[variant]) is None


def test_the_cached_step_runs_no_teacher(tiny, monkeypatch):
    step = tiny.variants(("cached",))["cached"]
    monkeypatch.setattr(training_step.Teacher, "attention", None)
    assert step() > 0


def test_a_step_leaves_no_gradients(tiny):
    step = tiny.variants(("fused",))["fused"]
    step()
    model, _, _ = training_step._models("cpu", "float32", "tiny", "minilm", 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrong_loss_gets_no_number(tiny, monkeypatch):
    naive_loss = training_step.naive_loss
    monkeypatch.setattr(training_step, "naive_loss", lambda *arguments: 2 * naive_loss(*arguments))
    assert "differs by" in tiny.check_result("fused", None)
