"""The C++ extension module ``idrm_kernels._C``, which pyproject.toml cannot declare; everything else is said there.

``IDRM_KERNELS_BUILD`` decides: ``auto`` (default) builds it where torch can be imported and a compiler works, and
goes on without it otherwise; ``force`` makes that an error; ``skip`` builds nothing. ``IDRM_KERNELS_SANITIZE`` names
sanitizers to build it with (``address``, ``thread``), as CONTRIBUTING.md describes.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SWITCH = "IDRM_KERNELS_BUILD"
# torch's stable ABI of release 2.11, and Python's of 3.10: one binary for all later ones.
# The compiler warns of its own headers.
QUIET = ["-Wno-maybe-uninitialized"]
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


class BuildOptional(build_ext):
    """Builds the extension; in ``auto``, a failure is one line and the installation goes on without it."""

    def build_extension(self, extension):
        try:
            # Found here, not above: pip's isolated build environments have no torch, and shall not download one.
            import torch
            from torch.utils.cpp_extension import include_paths

            extension.include_dirs += include_paths()
            extension.library_dirs += [str(Path(torch.__file__).parent / "lib")]
            super().build_extension(extension)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if mode() == "force":
                raise SystemExit(f"{SWITCH}=force: idrm_kernels._C could not be built: {reason}") from error
            print(f"idrm_kernels._C is left out, impl='torch' takes its place: {reason}", file=sys.stderr)
            self.extensions.remove(extension)


def mode():
    """What IDRM_KERNELS_BUILD asks for."""
    value = os.environ.get(SWITCH, "auto")
    if value not in ("auto", "force", "skip"):
        raise SystemExit(f"{SWITCH}: expected auto, force or skip, got {value!r}")
    return value


def extension():
    """The module's sources and flags; where torch lies is found when it is built."""
    sanitizers = os.environ.get("IDRM_KERNELS_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-g"] if sanitizers else []
    return Extension(
        "idrm_kernels._C",
        sources=sorted(path.as_posix() for path in Path("csrc").glob("*.cpp")),
        depends=sorted(path.as_posix() for path in Path("csrc").glob("*.h")),
        define_macros=MACROS,
        # Contracted multiply-adds; no other liberty with floating point.
        extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", *QUIET, *sanitize],
        extra_link_args=sanitize,
        libraries=["torch", "torch_cpu", "c10"],
        py_limited_api=True,
        language="c++",
    )


setup(ext_modules=[] if mode() == "skip" else [extension()], cmdclass={"build_ext": BuildOptional})
