"""Suite (d): what the teacher's forward pass costs on long pairs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.teacher import HALF, SHAPES, TeacherContest


def contests() -> list[tuple[TeacherContest, tuple[str, ...], bool]]:
    """(contest, variants, whether it is left to --full)."""

    def contest(device: str, dtype: str, shape: str, length: int, layers: int | None = None) -> TeacherContest:
        all_layers = SHAPES[shape][1]["num_hidden_layers"]
        return TeacherContest(device, dtype, shape, length, layers or all_layers, all_layers)

    variants = ("eager", "sdpa", HALF)
    everything = [
        # All blocks take some minutes, a quarter of them one.
        (contest("cpu", "float32", "deberta-large", 1024, layers=6), variants, False),
        (contest("cpu", "float32", "deberta-large", 256), variants, True),
        (contest("cpu", "float32", "deberta-large", 1024), variants, True),
        (contest("cpu", "float32", "modernbert-large", 1024), ("eager", "sdpa"), True),
    ]
    if torch.cuda.is_available():
        kernel = ("flashdeberta",) if importlib.util.find_spec("flashdeberta") else ()
        for length in (256, 1024, 2048):
            everything.append((contest("cuda", "bfloat16", "deberta-large", length), (*variants, *kernel), False))
            everything.append((contest("cuda", "bfloat16", "modernbert-large", length), ("eager", "sdpa"), True))
    return everything


@pytest.mark.parametrize(
    ("contest", "variant"),
    [
        pytest.param(contest, variant, id=f"{contest.name}-{variant}", marks=[pytest.mark.full] if left_out else [])
        for contest, variants, left_out in contests()
        for variant in variants
    ],
)
def test_teacher(contest, variant, compete):
    compete(contest, variant)
