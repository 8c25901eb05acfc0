"""Suites (a) and (c): the loss alone, over shapes, options and lengths."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.contest import FUSED, REPEATED
from benchmarks.op import NAIVE, NAIVE_COMPILED, YARDSTICK, OpContest

SHAPES = ((16, 64), (32, 128))
LENGTHS = (256, 512, 1024, 2048)
# Of a pair's tokens. Of HH-RLHF's, 58% are in common prompts, and with what both responses begin with two thirds.
SHARES = (0.25, 0.58, 0.9)
LONG_LENGTHS = (4096, 8192, 16384)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def contests() -> list[tuple[OpContest, tuple[str, ...], bool]]:
    """(contest, variants, whether it is left to --full)."""
    everything = []
    for device in DEVICES:
        fused = (NAIVE, "torch", FUSED[device], YARDSTICK)
        compiled = (*fused, NAIVE_COMPILED)
        slow = device == "cpu"
        dtypes = ("float32", "bfloat16") if slow else ("bfloat16", "float32", "float16")
        for dtype, (heads, head_dim), length in itertools.product(dtypes, SHAPES, LENGTHS):
            contest = OpContest(device, dtype, heads, head_dim, length)
            everything.append((contest, fused, dtype == "float16"))
            # Compiling takes half a minute a case.
            rare = dtype == "float16" or (slow and (heads, length) not in ((16, 512), (32, 1024)))
            everything.append((contest, (NAIVE_COMPILED,), rare))
            forward = OpContest(device, dtype, heads, head_dim, length, passes="forward")
            everything.append((forward, compiled, True))
        for dtype, length in itertools.product(dtypes[:2], (256, 1024, 2048)):
            shape = {"num_heads": 16, "head_dim": 64, "length": length}
            for options in (
                {"units": "merged"},
                {"teacher": "bias"},
                {"teacher": "stored"},
                {"normalization": "joint"},
                {"num_kv_heads": 4},
            ):
                left_out = slow and (length != 256 or dtype != "float32")
                everything.append((OpContest(device, dtype, **shape, **options), fused, left_out))
        shared = (NAIVE, "torch", f"torch{REPEATED}", FUSED[device], f"{FUSED[device]}{REPEATED}")
        for dtype, (heads, head_dim), share in itertools.product(dtypes[:2], SHAPES, SHARES):
            for teacher in ("packed", "stored"):
                contest = OpContest(device, dtype, heads, head_dim, 1024, teacher=teacher, shared=share)
                left_out = slow and (dtype, heads, share, teacher) != ("float32", 16, 0.58, "packed")
                everything.append((contest, shared, left_out))
        for length in LONG_LENGTHS:
            everything.append((OpContest(device, "bfloat16", 16, 64, length), fused, slow))
    return everything


@pytest.mark.parametrize(
    ("contest", "variant"),
    [
        pytest.param(contest, variant, id=f"{contest.name}-{variant}", marks=[pytest.mark.full] if left_out else [])
        for contest, variants, left_out in contests()
        for variant in variants
    ],
)
def test_loss(contest, variant, compete):
    compete(contest, variant)
