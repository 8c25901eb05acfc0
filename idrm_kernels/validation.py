"""Checks of the public functions' arguments: shapes, dtypes, devices, divisibility; values on the host only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idrm_kernels.inputs import DisentangledBias, PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: int, minimum: int) -> None:
    """Raises TypeError or ValueError unless value is an int of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_number(name: str, value: float) -> None:
    """Raises TypeError or ValueError unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Not math.isfinite: under torch.compile a weight may be symbolic.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_layout(layout: MapLayout) -> None:
    """Raises TypeError unless layout is a MapLayout."""
    if not isinstance(layout, MapLayout):
        raise TypeError(f"layout: expected a MapLayout, got {type(layout).__name__}")


def check_attention(
    name: str, attention: PackedAttention, layout: MapLayout, total_tokens: int, num_head_groups: int
) -> None:
    """Raises TypeError or ValueError unless one side fits the layout."""
    if not isinstance(attention, PackedAttention):
        raise TypeError(f"{name}: expected a PackedAttention, got {type(attention).__name__}")
    q, k = attention.q, attention.k
    for field, tensor in (("q", q), ("k", k)):
        _check_tensor(f"{name}.{field}", tensor, FLOATING, layout.device)
        if tensor.dim() != 3 or tensor.shape[0] != total_tokens:
            raise ValueError(
                f"{name}.{field}: expected shape ({total_tokens}, heads, head_dim) as the layout has "
                f"{total_tokens} tokens, got {tuple(tensor.shape)}"
            )
    if q.dtype != k.dtype:
        raise TypeError(f"{name}.k: expected the dtype of {name}.q, {q.dtype}, got {k.dtype}")
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(f"{name}.k: expected head_dim {q.shape[2]} (at least 1) as in {name}.q, got {k.shape[2]}")
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{name}.k: expected a num_kv_heads that divides num_heads={num_heads} of {name}.q, got {num_kv_heads}"
        )
    if num_heads % num_head_groups:
        raise ValueError(
            f"num_head_groups: expected a divisor of the {num_heads} heads of {name}.q, got {num_head_groups}"
        )
    if attention.softmax_scale is not None:
        check_number(f"{name}.softmax_scale", attention.softmax_scale)
    if not isinstance(attention.causal, bool):
        raise TypeError(f"{name}.causal: expected a bool, got {type(attention.causal).__name__}")
    if attention.causal and layout.segments != 1:
        raise ValueError(f"{name}.causal: expected a layout with segments = 1, got segments = {layout.segments}")
    if attention.position_bias is not None:
        _check_bias(f"{name}.position_bias", attention.position_bias, q)


def check_sides(
    student: PackedAttention, teacher: PackedAttention | StoredMaps, layout: MapLayout, num_head_groups: int
) -> None:
    """Raises TypeError or ValueError unless student and teacher fit the layout and the head groups."""
    check_layout(layout)
    check_count("num_head_groups", num_head_groups, 1)
    if isinstance(student, PackedAttention) and student.position_bias is not None:
        got = type(student.position_bias).__name__
        raise ValueError(f"student.position_bias: expected None (only a teacher may have one), got {got}")
    check_attention("student", student, layout, layout.total_tokens, num_head_groups)
    if isinstance(teacher, StoredMaps):
        _check_tensor("teacher.maps", teacher.maps, FLOATING, layout.device)
        expected = (layout.num_examples, num_head_groups, layout.max_units, layout.max_units)
        if tuple(teacher.maps.shape) != expected:
            raise ValueError(
                f"teacher.maps: expected shape (num_examples, num_head_groups, max_units, max_units) = {expected}, "
                f"got {tuple(teacher.maps.shape)}"
            )
    elif isinstance(teacher, PackedAttention):
        check_attention("teacher", teacher, layout, layout.teacher_total_tokens, num_head_groups)
    else:
        raise TypeError(f"teacher: expected a PackedAttention or StoredMaps, got {type(teacher).__name__}")


def check_row_weights(row_weights: Tensor | None, layout: MapLayout) -> None:
    """Raises TypeError or ValueError unless row_weights is None or one floating value a unit."""
    if row_weights is None:
        return
    _check_tensor("row_weights", row_weights, FLOATING, layout.device)
    if tuple(row_weights.shape) != (layout.total_units,):
        raise ValueError(f"row_weights: expected shape ({layout.total_units},), got {tuple(row_weights.shape)}")


def _check_bias(name: str, bias: DisentangledBias, q: Tensor) -> None:
    if not isinstance(bias, DisentangledBias):
        raise TypeError(f"{name}: expected a DisentangledBias, got {type(bias).__name__}")
    _check_tensor(f"{name}.positions", bias.positions, (torch.int32,), q.device)
    if tuple(bias.positions.shape) != (q.shape[0],):
        raise ValueError(f"{name}.positions: expected shape ({q.shape[0]},), got {tuple(bias.positions.shape)}")
    _check_tensor(f"{name}.slot_of_delta", bias.slot_of_delta, (torch.int32,), q.device)
    if bias.slot_of_delta.dim() != 1 or bias.slot_of_delta.shape[0] % 2 == 0:
        raise ValueError(
            f"{name}.slot_of_delta: expected shape (2 * max_delta + 1,), got {tuple(bias.slot_of_delta.shape)}"
        )
    for field, table in (("c2p", bias.c2p), ("p2c", bias.p2c)):
        if table is None:
            continue
        _check_tensor(f"{name}.{field}", table, (q.dtype, torch.float32), q.device)
        if table.dim() != 3 or table.shape[:2] != q.shape[:2] or table.shape[2] == 0:
            raise ValueError(
                f"{name}.{field}: expected shape ({q.shape[0]}, {q.shape[1]}, num_slots), got {tuple(table.shape)}"
            )
        if bias.c2p is not None and table.shape != bias.c2p.shape:
            raise ValueError(f"{name}.p2c: expected the shape of c2p {tuple(bias.c2p.shape)}, got {tuple(table.shape)}")
        if bias.slot_of_delta.device.type == "cpu" and not torch.compiler.is_compiling():
            least, most = bias.slot_of_delta.aminmax()
            if least < 0 or most >= table.shape[2]:
                beyond = int(least) if least < 0 else int(most)
                raise ValueError(f"{name}.slot_of_delta: expected slots in [0, {table.shape[2]}), got {beyond}")


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as the layout, got one on {tensor.device}")
