"""Runs that began from one tiny reward model, as folders."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def make_run(tmp_path, student_path):
    """make_run(seed, size=0.01): the tiny reward model with noise added to every weight, saved."""

    def make(seed: int, size: float = 0.01) -> Path:
        folder = tmp_path / f"run-{seed}"
        shutil.copytree(student_path, folder)
        generator = torch.Generator().manual_seed(seed)
        weights = load_file(folder / "model.safetensors")
        for name, values in weights.items():
            weights[name] = values + size * torch.randn(values.shape, generator=generator)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
