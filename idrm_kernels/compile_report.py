"""Compiles every Triton kernel as its launches would, without a GPU, and prints what the compilers made of it.

    python -m idrm_kernels.compile_report [--arch sm_80 sm_90 ...] [--head-dim 64 ...] [--dtype bf16 ...] [--json FILE]

For NVIDIA: registers a thread, bytes of spilled registers, shared memory a block, and matrix instructions (wgmma,
mma, tcgen05). For AMD: vector registers, spilled ones, LDS and mfma. Needs Triton alone: its wheel has the assemblers.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile

import torch
import triton
from triton._utils import canonicalize_dtype
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from idrm_kernels.api import _flat
from idrm_kernels.impl.problem import LossOptions, MapProblem
from idrm_kernels.inputs import DisentangledBias, PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
HEAD_DIMS = (64, 128)
VARIANTS = ("packed", "bias", "merged", "stored")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        kernel, arch, dtype, head_dim, variant: what was compiled, for what.
        tile: rows x columns of a tile, w warps, s stages.
        registers: a thread's. spilled_bytes: of them in memory. shared_bytes: a block's.
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


def recorded_launches(arch: str, dtype: str, head_dim: int, variant: str) -> dict[str, tuple]:
    """The kernels of a loss with gradients and the arguments they would be launched with, by name."""
    from idrm_kernels.impl.triton.batch import Batch
    from idrm_kernels.impl.triton.sweep import loss_of

    tokens, heads, slots = 256, 4, 512
    q, k = (torch.zeros(tokens, heads, head_dim, dtype=DTYPES[dtype]) for _ in range(2))
    units = [token // 2 for token in range(tokens)] if "merged" in variant else None
    layout = MapLayout.build([0, tokens // 2, tokens], unit_of_token=units)
    student = PackedAttention(q, k)
    teacher = PackedAttention(q, k)
    if "bias" in variant:
        tables = [torch.zeros(tokens, heads, slots, dtype=DTYPES[dtype]) for _ in range(2)]
        positions, slot_of_delta = torch.zeros(tokens, dtype=torch.int32), torch.zeros(1023, dtype=torch.int32)
        teacher = PackedAttention(q, k, position_bias=DisentangledBias(positions, slot_of_delta, *tables))
    elif variant == "stored":
        teacher = StoredMaps(torch.zeros(1, 1, tokens, tokens, dtype=DTYPES[dtype]))
    launches = {}

    def record(kernel, grid, **arguments) -> None:
        name = kernel.fn.__name__ + (" with bias" if arguments.get("positions") is not None else "")
        launches.setdefault(name, (kernel, arguments))

    problem = MapProblem(*_flat(student, teacher, layout, "l2", "block", 1, 64 << 20))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        loss_of(Batch(problem, arch=arch, run=record), LossOptions(None, "frobenius", 1.0, 1.0, True))
    finally:
        torch.set_float32_matmul_precision(precision)
    return launches


def compiled(kernel, arguments: dict, target) -> triton.compiler.CompiledKernel:
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
        return field("vgpr_count"), 4 * field("vgpr_spill_count"), field("group_segment_fixed_size"), counts
    counts = {
        name: len(re.findall(pattern, binary.asm["ptx"]))
        for name, pattern in {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}.items()
    }
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, binary.metadata.shared, {name: count for name, count in counts.items() if count}
