"""What a measurement was made on, and when: devices, versions, commit, date."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def describe() -> dict[str, object]:
    """Devices and versions by name; "cuda" only where there is a GPU."""
    description: dict[str, object] = {
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        description["cuda"] = torch.cuda.get_device_name()
        description["CUDA"] = torch.version.cuda
    for package in ("torch", "triton", "transformers"):
        try:
            description[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        from idrm_kernels.impl import cpp

        description["cpu_instructions"] = cpp.capability()
    except ImportError:
        description["cpu_instructions"] = "the CPU kernel is not built"
    return description


def cpu_name() -> str:
    """The processor's name as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit measured, marked where files differ from it."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"
