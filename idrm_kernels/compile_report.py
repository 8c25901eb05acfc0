"""Compiles every Triton kernel as its launches would, without a GPU, and prints what the compilers made of it.

    python -m idrm_kernels.compile_report [--arch sm_80 sm_90 ...] [--head-dim 64 ...] [--dtype bf16 ...] [--json FILE]

For NVIDIA: registers a thread, bytes of stack (spilled registers), shared memory a block, and matrix instructions
(wgmma, mma, tcgen05) in the code. For AMD: vector registers, spilled ones, LDS, mfma. Triton's wheel has all it takes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from idrm_kernels.api import _flat
from idrm_kernels.impl.problem import LossOptions, MapProblem
from idrm_kernels.impl.triton.batch import Batch
from idrm_kernels.impl.triton.primitives import INTERPRETED
from idrm_kernels.impl.triton.sweep import loss_of
from idrm_kernels.inputs import DisentangledBias, PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
HEAD_DIMS = (64, 128)
# What leads to other code, by its words: maps computed or stored, with a position bias, merged units, one softmax over
# all segments, the divergence, a causal mask, 64-row slabs, a prefix that the segments share.
UNSHARED_VARIANTS = ("packed", "stored", "bias", "merged", "merged stored", "joint kl", "causal", "cut")
SHARED_VARIANTS = ("shared", "shared merged", "shared kl")
VARIANTS = UNSHARED_VARIANTS + SHARED_VARIANTS


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        kernel, arch, dtype, head_dim, variant: what was compiled, for what.
        tile: rows x columns of a tile, w warps, s stages; empty where a kernel has no such tile.
        registers: a thread's. spilled_bytes: of its stack. shared_bytes: a block's.
        matrix_instructions: their count in the code by name.
    """

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    variant: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]


def report(arch: str, dtype: str, head_dim: int, variant: str) -> list[Compiled]:
    """Every kernel of a loss with gradients, compiled as pinned for an architecture."""
    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET: expected it unset, since interpreted kernels are not compiled")
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    rows = []
    for name, (kernel, arguments) in recorded_launches(arch, dtype, head_dim, variant).items():
        registers, spilled, shared, counts = resources(compiled(kernel, arguments, target), arch)
        tile = ""
        if "num_warps" in arguments:
            tile = "{BLOCK_M}x{BLOCK_N} w{num_warps} s{num_stages}".format(**arguments)
        rows.append(Compiled(name, arch, dtype, head_dim, variant, tile, registers, spilled, shared, counts))
    return rows


def recorded_launches(arch: str, dtype: str, head_dim: int, variant: str) -> dict[str, tuple]:
    """The kernels of a loss with gradients and the arguments they would be launched with, by name."""
    tokens, heads, slots = 256, 4, 512
    q, k = (torch.zeros(tokens, heads, head_dim, dtype=DTYPES[dtype]) for _ in range(2))
    segments = 1 if "causal" in variant else 2
    units = [token // 2 for token in range(tokens)] if "merged" in variant else None
    shared = [tokens // 4] if "shared" in variant else None
    layout = MapLayout.build(
        range(0, tokens + 1, tokens // segments), segments=segments, unit_of_token=units, shared_prefix_lens=shared
    )
    teacher = PackedAttention(q, k, causal="causal" in variant)
    student = PackedAttention(q[: layout.total_tokens], k[: layout.total_tokens], causal="causal" in variant)
    if "bias" in variant:
        tables = [torch.zeros(tokens, heads, slots, dtype=DTYPES[dtype]) for _ in range(2)]
        positions, slot_of_delta = torch.zeros(tokens, dtype=torch.int32), torch.zeros(1023, dtype=torch.int32)
        teacher = PackedAttention(q, k, position_bias=DisentangledBias(positions, slot_of_delta, *tables))
    elif "stored" in variant:
        teacher = StoredMaps(torch.zeros(1, 1, layout.max_units, layout.max_units, dtype=DTYPES[dtype]))
    metric = "kl" if "kl" in variant else "l2"
    normalization = "joint" if "joint" in variant else "block"
    workspace_bytes = 0 if "cut" in variant else 64 << 20
    launches = {}

    def record(kernel, grid, **arguments) -> None:
        # A kernel may be launched for the student without, and for the teacher with, the position bias; the one for
        # keys by the first, by a later and by the last slab of an example.
        name = kernel.fn.__name__ + (" with bias" if arguments.get("positions") is not None else "")
        if arguments.get("SHARED"):
            name += " shared"
        if "BEGINS" in arguments and not (arguments["BEGINS"] and arguments["ENDS"]):
            name += " begun" if arguments["ENDS"] else " to go on"
        launches.setdefault(name, (kernel, arguments))

    problem = MapProblem(*_flat(student, teacher, layout, metric, normalization, 1, workspace_bytes))
    with _matmul_precision("tf32" if dtype == "tf32" else "ieee"):
        loss_of(Batch(problem, arch=arch, run=record), LossOptions(None, "frobenius", 1.0, 1.0, True))
    return launches


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def compiled(kernel, arguments: dict, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """A kernel compiled for a target as a launch with these arguments would."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + canonicalize_dtype(value.dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{canonicalize_dtype(value.base.dtype)}[{shape}]>"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def resources(binary, arch: str) -> tuple[int, int, int, dict[str, int]]:
    """Registers, spilled bytes, shared bytes and matrix instructions of a compiled kernel."""
    if arch.startswith("gfx"):
        text = binary.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        counts = {"mfma": len(re.findall(r"^\s*v_mfma", text, re.MULTILINE))}
        registers, spilled = field("vgpr_count"), 4 * field("vgpr_spill_count")
    else:
        patterns = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}
        counts = {name: len(re.findall(pattern, binary.asm["ptx"])) for name, pattern in patterns.items()}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, spilled, binary.metadata.shared, {name: count for name, count in counts.items() if count}


def distinct(rows: list[Compiled]) -> list[Compiled]:
    """The rows without those that a kernel has in one more variant, where nothing is another."""
    seen, kept = set(), []
    for row in rows:
        key = json.dumps({**dataclasses.asdict(row), "variant": None}, sort_keys=True)
        if key not in seen:
            kept.append(row)
        seen.add(key)
    return kept


def table(rows: list[Compiled]) -> str:
    """The rows as aligned text."""
    header = ("kernel", "arch", "dtype", "head_dim", "variant", "tile", "registers", "spilled", "shared", "matrix")
    cells = [header]
    for row in rows:
        *values, counts = dataclasses.astuple(row)
        cells.append((*map(str, values), " ".join(f"{name}:{count}" for name, count in counts.items())))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main(arguments: list[str] | None = None) -> None:
    """The command: compiles what was asked for, in as many processes as there are cores, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m idrm_kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="default: all")
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS, help="default: 64 128")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    options = parser.parse_args(arguments)
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET: expected it unset, since interpreted kernels are not compiled")
    if not all(1 <= head_dim <= 256 for head_dim in options.head_dim):
        parser.error(f"--head-dim: expected 1 to 256, got {' '.join(map(str, options.head_dim))}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: expected a file in an existing folder, got {options.json}")
    jobs = list(itertools.product(options.arch, options.dtype, options.head_dim, options.variant))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        rows = distinct(list(itertools.chain.from_iterable(pool.map(report, *zip(*jobs, strict=True)))))
    print(table(rows))
    if options.json is not None:
        temporary = options.json.with_name(options.json.name + ".tmp")
        temporary.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
