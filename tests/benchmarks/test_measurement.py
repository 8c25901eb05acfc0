"""How calls are measured: rounds, memory, and what is not run."""

import sys

import pytest
import torch

from benchmarks import measurement
from benchmarks.measurement import FEWEST_ROUNDS, RecordedClock, available_bytes, measure, peak_rise

MEBIBYTE = 1 << 20


def test_rounds_alternate_and_their_order_turns(fake_contest):
    measured = measure(fake_contest(), ("a", "b", "c"))
    counts = {len(one.seconds) for one in measured.values()}
    assert len(counts) == 1
    assert min(counts) >= FEWEST_ROUNDS
    rounds = "".join(fake_contest.log)[6:]  # each has run twice before: to warm up, and for its memory
    assert fake_contest.log[:6] == ["a", "a", "b", "b", "c", "c"]
    assert rounds.startswith("abcbcacab")


def test_slow_contests_have_one_round(fake_contest, monkeypatch):
    monkeypatch.setattr(measurement, "SLOW_ROUND", 0.0)
    monkeypatch.setattr(measurement, "SLOW_CALL", 0.0)
    measured = measure(fake_contest(), ("a", "b"))
    assert [len(one.seconds) for one in measured.values()] == [1, 1]
    assert fake_contest.log == ["a", "b", "a", "b"]
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


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_call_holds_at_once():
    def call():
        for _ in range(3):  # one after another
            torch.ones(64 * MEBIBYTE, dtype=torch.int8)
        held = [torch.ones(48 * MEBIBYTE, dtype=torch.int8) for _ in range(2)]
        del held

    call()
    assert peak_rise(call, "cpu") == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    kept = torch.ones(200 * MEBIBYTE, dtype=torch.int8)
    assert peak_rise(call, "cpu") == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    del kept


def test_free_memory_is_that_of_a_machine():
    assert 16 * MEBIBYTE < available_bytes("cpu") < 1 << 50


def test_a_recorded_clock_replays_durations():
    clock = RecordedClock([0.25, 4.0])
    for expected in (0.25, 4.0):
        start = clock()
        assert clock() - start == expected
