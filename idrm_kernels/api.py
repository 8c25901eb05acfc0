"""The public functions: ordinary Python that validates its arguments and calls the op of one implementation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from idrm_kernels import validation
from idrm_kernels.impl import chunked
from idrm_kernels.impl.problem import MapProblem
from idrm_kernels.inputs import PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout, integers
from idrm_kernels.ops import IMPLEMENTATIONS, OPS
from idrm_kernels.reduction import REDUCTIONS

Implementation = Literal["auto", "triton", "cpp", "torch", "reference"]
METRICS = ("l2", "kl")
NORMALIZATIONS = ("block", "joint")
DEFAULT_WORKSPACE_BYTES = 64 << 20
# What "auto" tries, in order, by the device that the tensors are on; "torch" runs anywhere.
PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}


class MapLoss(NamedTuple):
    """Scalars of float32 (float64 for float64 inputs): the differentiable loss, and its detached, unweighted parts."""

    loss: Tensor
    intra: Tensor
    inter: Tensor


def attention_map_loss(
    student: PackedAttention,
    teacher: PackedAttention | StoredMaps,
    layout: MapLayout,
    *,
    reduction: Literal["frobenius", "row", "row_sq"] = "frobenius",
    metric: Literal["l2", "kl"] = "l2",
    normalization: Literal["block", "joint"] = "block",
    num_head_groups: int = 1,
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
    row_weights: Tensor | None = None,
    impl: Implementation = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> MapLoss:
    """Interaction-distillation loss: how far the student's attention maps are from the teacher's (DESIGN section 2).

    For one head, one pair of segments x, y of one example, and a unit a token, it is

        p_student, p_teacher = (scale * q[x] @ k[y].T).softmax(-1) of either model
        loss = (p_student - p_teacher).square().sum().sqrt()

    without allocating a map. Gradients are formed in the forward sweep when student.q or student.k needs them; backward
    multiplies them by the incoming scalar. Nothing reaches the teacher. Differentiating twice raises RuntimeError.

    Args:
        student: q (total_tokens, num_heads, head_dim) and k (total_tokens, num_kv_heads, head_dim) in one dtype.
        teacher: another model's attention over the same units, of any dtype, head counts and head_dim; or StoredMaps.
        layout: segments and units of the batch, built once and shared by all supervised blocks.
        reduction: of the row distances d of a block with weights w: "frobenius" is sqrt(sum w d), "row" is
            sum w sqrt(d) / sum w, "row_sq" is sum w d / sum w.
        metric: distance of two rows: "l2", the squared differences, or "kl", the divergence from the teacher's row.
        normalization: softmax over the keys of one segment ("block") or of all segments of the example ("joint").
        num_head_groups: contiguous groups that heads are averaged in before the comparison; divides both head counts.
        intra_weight, inter_weight: weights of the blocks x = y and x != y.
        row_weights: (total_units,), not negative; weights of the rows; default 1; not differentiated.
        impl: "auto" takes the best implementation that can run here; the result means the same with each.
        workspace_bytes: bound on the temporary memory beyond what is linear in tokens; at least one 64-row tile of one
            head group is used. Changes no bit of the result.

    Returns:
        MapLoss(loss, intra, inter): means over the examples (0 without any); loss = intra_weight * intra +
        inter_weight * inter.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or head counts that do not divide.
    """
    validation.check_choice("reduction", reduction, REDUCTIONS)
    for name, weight in (("intra_weight", intra_weight), ("inter_weight", inter_weight)):
        validation.check_number(name, weight)
    arguments = _arguments(student, teacher, layout, metric, normalization, num_head_groups, workspace_bytes)
    validation.check_row_weights(row_weights, layout)
    if row_weights is not None:
        row_weights = row_weights.detach()
    needs_grad = torch.is_grad_enabled() and (student.q.requires_grad or student.k.requires_grad)
    options = (row_weights, reduction, float(intra_weight), float(inter_weight), needs_grad)
    loss, intra, inter, _, _ = OPS[_chosen(impl, student, teacher)].loss(*arguments, *options)
    return MapLoss(loss, intra, inter)


def attention_map_distance(
    student: PackedAttention,
    teacher: PackedAttention | StoredMaps,
    layout: MapLayout,
    *,
    metric: Literal["l2", "kl"] = "l2",
    normalization: Literal["block", "joint"] = "block",
    num_head_groups: int = 1,
    impl: Implementation = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Row distances of the student's attention maps to the teacher's: the primitive under any other reduction.

    Arguments and errors are those of ``attention_map_loss``. Differentiable once in student.q and student.k; backward
    computes the maps' tiles again.

    Returns:
        (num_head_groups, total_units, segments), float32 (float64 for float64 inputs): entry [g, a, y] is the distance
        of row a within key segment y of its example; 0 where that segment is empty.
    """
    arguments = _arguments(student, teacher, layout, metric, normalization, num_head_groups, workspace_bytes)
    return OPS[_chosen(impl, student, teacher)].distance(*arguments)


def attention_map_rows(
    model: PackedAttention,
    layout: MapLayout,
    rows: Sequence[int] | Tensor,
    *,
    normalization: Literal["block", "joint"] = "block",
    num_head_groups: int = 1,
    teacher_side: bool = False,
) -> list[Tensor]:
    """Rows of a merged, head-averaged map, for inspection, pictures and StoredMaps; no gradient.

    Consecutive rows of an example are made together, in tiles, without a map of any head being held.

    Args:
        model: the student's attention, or with teacher_side the teacher's.
        layout: the layout of the batch.
        rows: unit rows, counted over the whole batch as in unit_of_token: ints or an integer tensor (rows,).
        normalization, num_head_groups: as in ``attention_map_loss``.
        teacher_side: whether model's tokens are the layout's teacher tokens.

    Returns:
        For each row a tensor (num_head_groups, units of its example), float32 (float64 for float64 inputs): one column
        a unit, segment after segment. Within every segment ("block"), or in all ("joint"), it sums to 1.

    Raises:
        TypeError, ValueError: as ``attention_map_loss``; ValueError: a row beyond the layout's units.
    """
    validation.check_layout(layout)
    validation.check_choice("normalization", normalization, NORMALIZATIONS)
    validation.check_count("num_head_groups", num_head_groups, 1)
    tokens = layout.teacher_total_tokens if teacher_side else layout.total_tokens
    validation.check_attention("model", model, layout, tokens, num_head_groups)
    rows = integers("rows", rows.cpu() if isinstance(rows, Tensor) else rows).tolist()
    for row in rows:
        if not 0 <= row < layout.total_units:
            raise ValueError(f"rows: expected unit rows in [0, {layout.total_units}), got {row}")
    model = model.detach()
    problem = MapProblem(*_flat(model, model, layout, "l2", normalization, num_head_groups, 0))
    side = problem.teacher  # with the position bias that the model may have
    if not teacher_side:
        student = problem.unshared().student
        side = side._replace(
            q=student.q,
            k=student.k,
            unit_offsets=student.unit_offsets,
            device_unit_offsets=student.device_unit_offsets,
        )
    with torch.autocast(model.q.device.type, enabled=False):
        return chunked.map_rows(problem, side, rows)


def available_implementations() -> tuple[str, ...]:
    """What ``impl`` may name here besides "auto"."""
    return tuple(name for name, module in IMPLEMENTATIONS.items() if name != "triton" or module.is_usable())


def _chosen(impl: str, student: PackedAttention, teacher: PackedAttention | StoredMaps) -> str:
    """The implementation to take; for "auto" the best that can take these tensors where they are."""
    validation.check_choice("impl", impl, ("auto", "triton", "cpp", "torch", "reference"))
    if impl == "auto":
        for name in PREFERENCE.get(student.q.device.type, ("torch",)):
            if name in IMPLEMENTATIONS and _obstacle(name, student, teacher) is None:
                return name
            if name == "cpp" and name not in IMPLEMENTATIONS and not torch.compiler.is_compiling():
                _warn_that_cpp_is_missing()
    if impl not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, available_implementations()))
        raise ValueError(f"impl: {impl!r} is not available here; available are {names} and 'auto'")
    obstacle = _obstacle(impl, student, teacher)
    if obstacle is not None:
        raise ValueError(f"impl: {impl!r} cannot run here: {obstacle}")
    return impl


def _obstacle(impl: str, student: PackedAttention, teacher: PackedAttention | StoredMaps) -> str | None:
    """Why an implementation cannot take these tensors; None where it can. One without limits has no ``obstacle``."""
    find = getattr(IMPLEMENTATIONS[impl], "obstacle", None)
    return None if find is None else find(student.q, None if isinstance(teacher, StoredMaps) else teacher.q)


@functools.cache
def _warn_that_cpp_is_missing() -> None:
    """Once a process."""
    warnings.warn(
        "idrm_kernels: the CPU kernel was not built, impl='torch' takes its place and is slower. With g++ installed, "
        "build it: IDRM_KERNELS_BUILD=force pip install --no-build-isolation -e .",
        stacklevel=4,
    )


def _arguments(
    student: PackedAttention,
    teacher: PackedAttention | StoredMaps,
    layout: MapLayout,
    metric: str,
    normalization: str,
    num_head_groups: int,
    workspace_bytes: int,
) -> tuple:
    """The validated arguments of a distance op, in the order of its schema."""
    validation.check_choice("metric", metric, METRICS)
    validation.check_choice("normalization", normalization, NORMALIZATIONS)
    validation.check_count("workspace_bytes", workspace_bytes, 0)
    validation.check_sides(student, teacher, layout, num_head_groups)
    return _flat(student, teacher, layout, metric, normalization, num_head_groups, workspace_bytes)


def _flat(student, teacher, layout, metric, normalization, num_head_groups, workspace_bytes) -> tuple:
    """The fields of a MapProblem; nothing of the teacher's requires grad."""
    teacher = teacher.detach()
    stored = isinstance(teacher, StoredMaps)
    bias = None if stored else teacher.position_bias
    return (
        student.q,
        student.k,
        None if stored else teacher.q,
        None if stored else teacher.k,
        None if bias is None else bias.positions,
        None if bias is None else bias.slot_of_delta,
        None if bias is None else bias.c2p,
        None if bias is None else bias.p2c,
        teacher.maps if stored else None,
        layout.cu_units,
        layout.unit_offsets,
        layout.teacher_unit_offsets,
        layout.device_unit_offsets,
        layout.teacher_device_unit_offsets,
        layout.shared_units,
        layout.token_index,
        layout.device_token_index,
        layout.plan,
        layout.device_plan,
        layout.segments,
        student.scale,
        1.0 if stored else teacher.scale,
        student.causal,
        False if stored else teacher.causal,
        metric,
        normalization,
        num_head_groups,
        workspace_bytes,
    )
