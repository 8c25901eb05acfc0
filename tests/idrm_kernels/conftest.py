"""Fixtures for the kernels' tests."""

import pytest
import torch

from idrm_kernels import available_implementations

IMPLEMENTATIONS = available_implementations()
# Those that take float64, which GPU kernels do not.
EXACT_IMPLEMENTATIONS = tuple(name for name in IMPLEMENTATIONS if name != "triton")


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    """Every implementation that can run here."""
    return request.param


@pytest.fixture(params=EXACT_IMPLEMENTATIONS)
def exact_impl(request):
    """Every implementation that takes float64."""
    return request.param


@pytest.fixture
def widest_dtype(impl):
    """The widest dtype that the implementation takes."""
    return torch.float64 if impl in EXACT_IMPLEMENTATIONS else torch.float32


@pytest.fixture
def device(impl):
    """Where the implementation is tested: on the GPU where there is one and it is made for one."""
    return torch.device("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Uninitialised memory is NaN, so that an output left unwritten fails."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)
