"""Suite (b): what interaction distillation adds to a training step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training_step import LADDER, LAYERS, StepContest

# Of the 8B shape in bfloat16 at 2 x 2048 tokens: weights, their gradients and activations of a block; and beside the
# blocks the embeddings with their gradients, the teacher, and the naive loss's maps.
GIGABYTES_A_LAYER, OTHER_GIGABYTES = 2.0, 18.0


def contests() -> list[tuple[StepContest, bool]]:
    """(contest, whether it is left to --full)."""
    everything = [
        (StepContest("cpu", "float32", "small", "minilm", length, LAYERS["small"], LAYERS["small"]), length != 512)
        for length in (256, 512, 1024)
    ]
    if torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
        all_layers = LAYERS["llama-3-8b"]
        layers = max(2, min(all_layers, int((gigabytes - OTHER_GIGABYTES) / GIGABYTES_A_LAYER)))
        everything += [
            (StepContest("cuda", "bfloat16", "llama-3-8b", "deberta-large", length, layers, all_layers), False)
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
def test_step(contest, variant, compete):
    compete(contest, variant)
