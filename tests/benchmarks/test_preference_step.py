"""A step beside TRL's: all variants give the rewards of the same pairs, and do what they say."""

import dataclasses
import gzip
import json

import pytest
import torch

from benchmarks import preference_step, training_step
from benchmarks.preference_step import REAL_PAIRS, VARIANTS, PreferenceStepContest
from idrm.capture import Teacher


@pytest.fixture
def tiny(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(training_step.STUDENTS, "tiny", {**shape, "vocab_size": 8000})
    preference_step._step.cache_clear()
    yield PreferenceStepContest("cpu", "float32", "tiny", 2, "minilm", 0.5, 24, 2, 2)
    preference_step._step.cache_clear()


def test_all_variants_give_trls_rewards(tiny, monkeypatch):
    calls = tiny.variants(VARIANTS)
    rewards = {name: call() for name, call in calls.items()}
    assert rewards["trl"].shape == (2, 4)
    assert rewards["trl"].std() > 0
    for name in VARIANTS:
        assert tiny.check(name) is None
        assert tiny.check_result(name, rewards[name]) is None
    assert "rewards differ by " in tiny.check_result("shared", rewards["shared"] + 1)
    step = preference_step._step(tiny)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    packed = step.trainers["shared"].data_collator(step.batches[0])["packed_pairs"]
    for pair in packed.pairs:
        assert 2 * pair.shared / (2 * pair.shared + pair.chosen + pair.rejected) == pytest.approx(0.5, abs=0.1)
    monkeypatch.setattr(Teacher, "attention", None)
    assert torch.equal(calls["shared-cached"](), rewards["shared-cached"])
    with pytest.raises(TypeError):
        calls["shared-live"]()


def test_real_pairs_are_read_where_they_are(tiny, tmp_path, monkeypatch):
    with gzip.open(tmp_path / REAL_PAIRS, "wt") as file:
        for index in range(12):
            dialogue = f"\n\nHuman: Is it far to the number {index}?\n\nAssistant:"
            file.write(json.dumps({"chosen": f"{dialogue} Ten minutes.", "rejected": f"{dialogue} Yes."}) + "\n")
    monkeypatch.setenv("IDRM_TEST_DATA", str(tmp_path))
    contest = dataclasses.replace(tiny, shared=None, length=64)
    assert "-hh-2x2-pairs-2x64" in contest.name
    rewards = {name: call() for name, call in contest.variants(("trl", "shared")).items()}
    assert contest.check_result("shared", rewards["shared"]) is None
