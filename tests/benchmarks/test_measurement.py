"""How calls are measured: rounds, memory, and what is not run."""

import sys

import pytest
import torch

from benchmarks import measurement
from benchmarks.measurement import FEWEST_ROUNDS, RecordedClock, available_bytes, measure, peak_rise
from benchmarks.op import OpContest
from idrm_kernels import available_implementations

MEBIBYTE = 1 << 20


def test_rounds_alternate_in_changing_order(fake_contest):
    measured = measure(fake_contest(), ("a", "b", "c"))
    counts = {len(one.seconds) for one in measured.values()}
    assert len(counts) == 1
    assert min(counts) >= FEWEST_ROUNDS
    # Each has run twice before: to warm up, and for its memory.
    assert fake_contest.log[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = ["".join(fake_contest.log[start : start + 3]) for start in range(6, len(fake_contest.log), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_slow_contests_have_one_round(fake_contest, monkeypatch):
    monkeypatch.setattr(measurement, "SLOW_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "SLOW_CALL_SECONDS", 0.0)
    measured = measure(fake_contest(), ("a", "b"))
    assert [len(one.seconds) for one in measured.values()] == [1, 1]
    assert fake_contest.log[:2] == ["a", "b"]
    assert sorted(fake_contest.log[2:]) == ["a", "b"]
    assert measured["a"].peak_bytes is not None


def test_what_would_not_fit_is_not_run(fake_contest):
    measured = measure(fake_contest(length=2000), ("naive", "cpp"))
    assert measured["naive"].needed_bytes == 1 << 60
    assert not measured["naive"].seconds
    assert measured["cpp"].seconds
    assert set(fake_contest.log) == {"cpp"}


def test_what_is_wrong_is_not_measured(fake_contest):
    measured = measure(fake_contest(wrong="cpp"), ("naive", "cpp"))
    assert measured["cpp"].failure == "cpp is wrong"
    assert not measured["cpp"].seconds
    assert set(fake_contest.log) == {"naive"}


def test_what_returns_nonsense_is_not_timed(fake_contest):
    measured = measure(fake_contest(nonsense="cpp"), ("naive", "cpp"))
    assert measured["cpp"].failure == "cpp returned nonsense"
    assert not measured["cpp"].seconds
    assert fake_contest.log.count("cpp") == 2
    assert measured["naive"].seconds


def test_a_failing_variant_leaves_the_others_their_numbers(fake_contest):
    class Failing(fake_contest):
        def variants(self, names):
            def fail():
                raise RuntimeError("no compiler\nfound")

            return {name: fail if name == "torch" else call for name, call in super().variants(names).items()}

    measured = measure(Failing(), ("naive", "torch"))
    assert measured["torch"].failure == "RuntimeError: no compiler found"
    assert not measured["torch"].seconds
    assert measured["naive"].seconds


def test_running_out_of_memory_is_a_row(fake_contest):
    class Large(fake_contest):
        def variants(self, names):
            def fail():
                raise torch.OutOfMemoryError("CUDA out of memory")

            return {name: fail if name == "naive" else call for name, call in super().variants(names).items()}

    measured = measure(Large(), ("naive", "cpp"))
    assert measured["naive"].needed_bytes > 16 * MEBIBYTE
    assert measured["naive"].peak_bytes is None
    assert measured["cpp"].seconds


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_call_holds_at_once():
    def call():
        for _ in range(3):  # one after another
            torch.ones(64 * MEBIBYTE, dtype=torch.int8)
        held = [torch.ones(48 * MEBIBYTE, dtype=torch.int8) for _ in range(2)]
        del held

    call()
    before, rise, _ = peak_rise(call, "cpu")
    assert rise == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    kept = torch.ones(200 * MEBIBYTE, dtype=torch.int8)
    before_kept, rise, _ = peak_rise(call, "cpu")
    assert rise == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    assert before_kept - before == pytest.approx(200 * MEBIBYTE, abs=4 * MEBIBYTE)
    del kept


@pytest.mark.skipif("cpp" not in available_implementations(), reason="the CPU kernel was not built")
def test_what_the_kernel_keeps_counts_as_its_own():
    contest = OpContest("cpu", "float32", 8, 64, 200)
    (call,) = contest.variants(("cpp",)).values()
    rises = [peak_rise(call, "cpu")[1] for _ in range(3)]
    assert rises[2] > 0.8 * rises[1] > 4 * MEBIBYTE


def test_free_memory_is_that_of_a_machine():
    assert 16 * MEBIBYTE < available_bytes("cpu") < 1 << 50


def test_a_recorded_clock_replays_durations():
    clock = RecordedClock([0.25, 4.0])
    for expected in (0.25, 4.0):
        start = clock()
        assert clock() - start == expected
