"""DeBERTa's attention without maps equals the plain formula, within its workspace, and flashdeberta is held to it."""

import contextlib
import functools
import logging
import sys
from types import ModuleType

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from idrm.capture import disentangled_attention
from idrm.capture.disentangled_attention import flashdeberta, flashdeberta_obstacle, sdpa_in_row_chunks
from idrm_kernels.testing.cases import error_bound
from idrm_kernels.testing.memory import peak_bytes

HEADS, HEAD_DIM, SPAN = 3, 16, 20
SCALE = (3 * HEAD_DIM) ** -0.5
TERMS = {"both": (True, True), "c2p": (True, False), "p2c": (False, True), "neither": (False, False)}


def problem(terms="both", tokens=70, lengths=(70, 41, 1), padding_side="right", dtype=torch.float64):
    """Arguments of sdpa_in_row_chunks, of which rounded values stay as they are in float64."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return (1.5 * torch.randn(*shape, HEADS, HEAD_DIM, generator=generator)).bfloat16().to(dtype)

    q, k, v = (normal(len(lengths), tokens) for _ in range(3))
    c2p, p2c = TERMS[terms]
    positions = torch.arange(tokens).flip(0) if padding_side == "left" else torch.arange(tokens)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": positions < torch.tensor(lengths)[:, None],
        "softmax_scale": SCALE,
        "pos_key": normal(2 * SPAN) if c2p else None,
        "pos_query": normal(2 * SPAN) if p2c else None,
        "slot_of_delta": (torch.arange(-tokens, tokens + 1) + SPAN).clamp(0, 2 * SPAN - 1).int(),
    }


def plain(q, k, v, mask, softmax_scale, pos_key, pos_query, slot_of_delta):
    """The formula, every map held, as transformers rounds it: (batch, tokens, heads, head_dim)."""
    positions = torch.arange(q.shape[1])
    slots = slot_of_delta[positions[:, None] - positions + len(slot_of_delta) // 2].long()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    if pos_key is not None:
        scores = scores + torch.einsum("bihd,ijhd->bhij", q, pos_key[slots]) * softmax_scale
    if pos_query is not None:
        scores = scores + torch.einsum("bjhd,ijhd->bhij", k, pos_query[slots]) * softmax_scale
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("terms", TERMS)
def test_float64_equals_the_formula(terms, padding_side):
    arguments = problem(terms, padding_side=padding_side)
    real = arguments["mask"]
    torch.testing.assert_close(sdpa_in_row_chunks(**arguments)[real], plain(**arguments)[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 32, 69, 70, 140, 1000])
def test_chunks_of_rows_and_of_examples_make_no_difference(rows):
    """No row, one row, ragged chunks, one example, two, and all three at once."""
    arguments = problem()
    real = arguments["mask"]
    chunked = sdpa_in_row_chunks(**arguments, workspace_bytes=rows * HEADS * 70 * 8)
    torch.testing.assert_close(chunked[real], plain(**arguments)[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", TERMS)
def test_errors_are_at_most_twice_those_of_the_formula_in_the_same_dtype(terms, dtype):
    arguments, exact = problem(terms, dtype=dtype), plain(**problem(terms))
    real = arguments["mask"]
    result = sdpa_in_row_chunks(**arguments, workspace_bytes=40 * HEADS * 70 * 8)
    assert result.dtype == dtype
    error = (result.double() - exact)[real].abs().max()
    assert error <= error_bound(plain(**arguments)[real], exact[real], torch.finfo(dtype).eps)


def test_memory_is_linear_in_tokens_beyond_the_workspace():
    workspace, peaks = 1 << 20, {}
    for tokens in (600, 1200):
        arguments = problem(tokens=tokens, lengths=(tokens, tokens), dtype=torch.float32)
        call = functools.partial(sdpa_in_row_chunks, **arguments, workspace_bytes=workspace)
        peaks[tokens] = peak_bytes(call)
    linear = 1200 * HEADS * (2 * SPAN + 2 * 2 * HEAD_DIM) * 4
    assert peaks[1200] < 4 * workspace + 2 * linear
    assert peaks[1200] < HEADS * 1200**2 * 4  # one map of one example
    assert peaks[1200] < 1.5 * peaks[600]


@pytest.fixture
def no_device_guard(monkeypatch):
    """flashdeberta's launches choose the GPU of their tensors, which there is none of in Triton's interpreter."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


@pytest.mark.skipif(sys.platform != "linux", reason="flashdeberta, of the test extra, needs Triton, which is for Linux")
@pytest.mark.parametrize("terms", ["both", "c2p", "p2c"])
def test_flashdeberta_equals_the_formula(terms, no_device_guard):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments, exact = problem(terms, dtype=torch.float16), plain(**problem(terms))
    real = arguments["mask"]
    del arguments["slot_of_delta"]
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    result = flashdeberta(**arguments, position_buckets=-1, max_relative_positions=SPAN)[real].double().cpu()
    same_dtype = plain(**problem(terms, dtype=torch.float16))[real]
    assert (result - exact[real]).abs().max() <= error_bound(same_dtype, exact[real], torch.finfo(torch.float16).eps)


@pytest.fixture
def installed(monkeypatch):
    """installed(error=0.0, ignoring=""): a flashdeberta with these faults, and what it is called with."""
    calls = []

    def install(error=0.0, ignoring=""):
        def attention(q, k, v, seq_lengths, pos_key, pos_query, **options):
            calls.append(options)
            buckets, reach = options["position_buckets"], options["max_relative_distance"]
            tokens = q.shape[2]
            delta = torch.arange(-tokens, tokens + 1)
            if buckets > 0 and "log" not in ignoring:
                delta = make_log_bucket_position(delta, buckets, reach).long()
            zero = buckets if buckets > 0 else reach
            slots = (delta + zero).clamp(0, 2 * zero - 1)
            if "one term" in ignoring and None in (pos_key, pos_query):
                return torch.zeros_like(q)
            result = sdpa_in_row_chunks(
                *(heads.transpose(1, 2) for heads in (q, k, v)),
                torch.arange(tokens) < seq_lengths[:, None],
                softmax_scale=options["sm_scale"],
                pos_key=None if pos_key is None else pos_key[0].transpose(0, 1),
                pos_query=None if pos_query is None else pos_query[0].transpose(0, 1),
                slot_of_delta=slots,
            )
            return result.transpose(1, 2) + error

        module = ModuleType("flashdeberta.ops.flash_attention")
        module.flash_attention_with_disentangled = attention
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(sys.modules, "flashdeberta.ops", ModuleType("flashdeberta.ops"))
        monkeypatch.setitem(sys.modules, "flashdeberta", ModuleType("flashdeberta"))
        monkeypatch.setattr(disentangled_attention.importlib.util, "find_spec", lambda name: module)
        return calls

    flashdeberta_obstacle.cache_clear()
    yield install
    flashdeberta_obstacle.cache_clear()


def test_flashdeberta_is_held_to_small_problems(installed):
    calls = installed()
    wrong = disentangled_attention._wrong_on_a_small_problem
    assert wrong(torch.bfloat16, 16, torch.device("cpu")) is None
    assert calls[0]["sm_scale"] == 48**-0.5
    installed(error=0.1)
    assert "is off by 0.1" in wrong(torch.bfloat16, 16, torch.device("cpu"))
    for fault in ("log buckets", "one term"):
        installed(ignoring=fault)
        assert "is off by" in wrong(torch.bfloat16, 16, torch.device("cpu"))


def test_a_flashdeberta_that_fails_is_an_obstacle_and_not_an_error(installed, monkeypatch, caplog):
    installed()
    broken = ModuleType("flashdeberta.ops.flash_attention")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small_problem = disentangled_attention._wrong_on_a_small_problem

    def on_the_cpu(dtype, head_dim, device):
        return small_problem(dtype, head_dim, torch.device("cpu"))

    monkeypatch.setattr(disentangled_attention, "_wrong_on_a_small_problem", on_the_cpu)
    with caplog.at_level(logging.WARNING):
        obstacle = flashdeberta_obstacle(torch.bfloat16, 16, torch.device("cuda", 0))
    assert obstacle.startswith("fails here: ImportError: ")
    assert obstacle in caplog.text


def test_what_keeps_flashdeberta_from_running(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(disentangled_attention.importlib.util, "find_spec", lambda name: None)
    assert flashdeberta_obstacle(torch.bfloat16, 64) == "is not installed: pip install 'idrm[flashdeberta]'"
    flashdeberta_obstacle.cache_clear()
    installed()
    assert flashdeberta_obstacle(torch.float32, 64) == (
        "computes in bfloat16 or float16, and the teacher is in float32"
    )
    assert flashdeberta_obstacle(torch.bfloat16, 64) == "needs a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flashdeberta_obstacle(torch.bfloat16, 32) is None
    assert flashdeberta_obstacle(torch.bfloat16, 64, torch.device("cpu")) == "needs a GPU"
