"""The ladder of a training step."""

import pytest
import torch

from benchmarks import training_step
from benchmarks.training_step import LADDER, StepContest


@pytest.fixture
def tiny(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(training_step.STUDENTS, "tiny", {**shape, "vocab_size": 1000})
    training_step._models.cache_clear()
    yield StepContest("cpu", "float32", "tiny", "minilm", 50, 2)
    training_step._models.cache_clear()


def test_every_rung_adds_what_it_says(tiny):
    losses = {name: call() for name, call in tiny.variants(LADDER).items()}
    assert losses["bradley-terry"] == losses["capture"] == losses["teacher"]
    assert losses["fused"] > losses["teacher"]
    torch.testing.assert_close(losses["fused"], losses["naive"])
    assert tiny.check("fused") is None


def test_a_wrong_loss_gets_no_number(tiny, monkeypatch):
    naive_loss = training_step.naive_loss
    monkeypatch.setattr(training_step, "naive_loss", lambda *arguments: 2 * naive_loss(*arguments))
    assert "differs by" in tiny.check("fused")
