"""Suite (b): what interaction distillation adds to a training step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training_step import LADDER, LAYERS, StepContest

# Weights, their gradients, the activations of 2 x 2048 tokens and a naive loss beside them, per block of the 8B shape.
GIGABYTES_A_LAYER, GIGABYTES_BESIDE = 1.6, 14


def contests() -> list[tuple[StepContest, bool]]:
    """(contest, whether it is left to --full)."""
    everything = [
        (StepContest("cpu", "float32", "small", "minilm", length, LAYERS["small"]), length != 512)
        for length in (256, 512, 1024)
    ]
    if torch.cuda.is_available():
        gigabytes = torch.cuda.mem_get_info()[0] / 1e9
        layers = max(2, min(LAYERS["llama-3-8b"], int((gigabytes - GIGABYTES_BESIDE) / GIGABYTES_A_LAYER)))
        everything += [
            (StepContest("cuda", "bfloat16", "llama-3-8b", "deberta-large", length, layers), False)
            for length in (512, 1024, 2048)
        ]
    return everything


@pytest.mark.parametrize(
    ("contest", "variant"),
    [
        pytest.param(contest, variant, id=f"{contest.name}-{variant}", marks=[pytest.mark.full] if left_out else [])
        for contest, left_out in contests()
        for variant in LADDER
    ],
)
def test_step(contest, variant, record):
    record(contest, variant)
