"""Suite (c): a step of other trainers, two rows a pair, against one in which each prompt is read once."""

from __future__ import annotations

import os

import pytest

from benchmarks.preference_step import VARIANTS, PreferenceStepContest

SHARES = (0.0, 0.25, 0.5, 0.58, 0.75, 0.9)


def contests() -> list[tuple[PreferenceStepContest, bool]]:
    """(contest, whether it is left to --full)."""

    def contest(shared: float | None, batch: int, batches: int) -> PreferenceStepContest:
        return PreferenceStepContest("cpu", "float32", "small", 8, "minilm", shared, 512, batch, batches)

    everything = [(contest(shared, 2, 1), shared != 0.58) for shared in SHARES]
    if "IDRM_TEST_DATA" in os.environ:
        everything.append((contest(None, 8, 4), False))
    return everything


@pytest.mark.parametrize(
    ("contest", "variant"),
    [
        pytest.param(contest, variant, id=f"{contest.name}-{variant}", marks=[pytest.mark.full] if left_out else [])
        for contest, left_out in contests()
        for variant in VARIANTS
    ],
)
def test_preference_step(contest, variant, compete):
    compete(contest, variant)
