"""Fixtures for the kernels' tests."""

import pytest
import torch

from idrm_kernels import available_implementations


@pytest.fixture(params=available_implementations())
def impl(request):
    """Every implementation that can run here."""
    return request.param


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Uninitialised memory is NaN, so that an output left unwritten fails."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)
