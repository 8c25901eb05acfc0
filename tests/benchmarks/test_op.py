"""The op's contests: what they compare, and that wrong results get no number."""

import dataclasses

import pytest
import torch

from benchmarks import op
from benchmarks.op import OpContest
from idrm_kernels import available_implementations

SMALL = OpContest("cpu", "float32", 4, 16, 40)
OPTIONS = [
    {},
    {"dtype": "bfloat16"},
    {"units": "merged"},
    {"teacher": "bias"},
    {"teacher": "stored"},
    {"normalization": "joint"},
    {"num_kv_heads": 2},
    {"passes": "forward"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_variants_agree(options):
    contest = dataclasses.replace(SMALL, **options)
    names = tuple(name for name in ("naive", "torch", "cpp") if name == "naive" or name in available_implementations())
    results = {name: call() for name, call in contest.variants(names).items()}
    assert [contest.check(name) for name in names] == [None] * len(names)
    assert [contest.check_result(name, results[name]) for name in names] == [None] * len(names)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if contest.dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-6}
    for name in names:
        assert len(results[name]) == (1 if contest.passes == "forward" else 3)
        torch.testing.assert_close(results[name], results["naive"], **tolerance)


def test_the_yardstick_reads_the_same_tokens():
    (call,) = SMALL.variants((op.YARDSTICK,)).values()
    output, dq, dk = call()
    assert output.shape == (1, 4, 80, 16)
    assert dq.shape == dk.shape == (80, 4, 16)


def test_a_wrong_implementation_gets_no_number(monkeypatch):
    right = op.attention_map_loss

    def wrong(*arguments, impl, **options):
        result = right(*arguments, impl=impl, **options)
        return result._replace(loss=result.loss * 1.001) if impl == "torch" else result

    op._results.cache_clear()
    op._failure.cache_clear()
    contest = dataclasses.replace(SMALL, length=41)
    monkeypatch.setattr(op, "attention_map_loss", wrong)
    assert contest.check("torch").startswith("loss of cpu-float32-4x16-2x41 is off by")
    op._results.cache_clear()
    op._failure.cache_clear()


def test_a_result_that_is_off_at_full_size_gets_no_number():
    loss, dq, dk = next(iter(SMALL.variants(("torch",)).values()))()
    dk = dk.clone()
    dk[-1] = 0
    assert "dk of cpu-float32-4x16-2x40 is off by" in SMALL.check_result("torch", (loss, dq, dk))


def test_an_implementation_that_is_not_there_gets_no_number(monkeypatch):
    monkeypatch.setattr(op, "available_implementations", lambda: ("torch", "reference"))
    assert SMALL.check("cpp") == "cpp is not available here"


def test_the_naive_losss_memory_is_foretold_within_a_third():
    contest = OpContest("cpu", "float32", 4, 16, 1200)
    foretold = contest.needed_bytes("naive")
    (call,) = contest.variants(("naive",)).values()
    call()
    assert op.peak_rise(call, "cpu")[1] == pytest.approx(foretold, rel=0.34)
    assert contest.needed_bytes("cpp") is None
    assert SMALL.needed_bytes("naive") is None


def test_the_roof_counts_products_and_exponentials(monkeypatch):
    monkeypatch.setattr(op.roof, "flops_per_second", lambda device, dtype: 1e9)
    monkeypatch.setattr(op.roof, "exps_per_second", lambda device: 1e8)
    entries = 80 * 80
    student = 4 * entries * (3 * 2 * 16 / 1e9 + 1 / 1e8)
    teacher = 16 * entries * (2 * 64 / 1e9 + 1 / 1e8)
    assert SMALL.roof_seconds("cpp") == pytest.approx(student + teacher)
    assert SMALL.roof_seconds("naive") is None
    assert dataclasses.replace(SMALL, units="merged").roof_seconds("cpp") is None
