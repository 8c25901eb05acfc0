"""What the host knows about a batch: its segments and units, validated once and shared by every supervised block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from idrm_kernels.tiles import make_plan

Counts = Sequence[int] | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class MapLayout:
    """Segments, units and sizes of one packed batch (DESIGN sections 2 and 3), made by ``build`` or ``from_mask``.

    Attributes:
        segments: segments per example.
        num_examples, total_tokens, teacher_total_tokens, total_units: sizes of the batch.
        max_units: units of the largest example, all its segments together (the side of StoredMaps).
        max_unit_tokens, teacher_max_unit_tokens: tokens of the largest unit on either side.
        cu_units: (num_segments + 1,) int64 on the host, cumulative units.
        unit_offsets: (total_units + 1,) int64 on the host; unit a holds the student's tokens
            unit_offsets[a]:unit_offsets[a + 1], so segment s begins at token unit_offsets[cu_units[s]].
        teacher_unit_offsets: the same for the teacher's tokens.
        device_unit_offsets, teacher_device_unit_offsets: the two on the device of q and k.
        plan, device_plan: the fused kernels' tile plan (``idrm_kernels.tiles``), on the host and on the device.
    """

    segments: int
    num_examples: int
    total_tokens: int
    teacher_total_tokens: int
    total_units: int
    max_units: int
    max_unit_tokens: int
    teacher_max_unit_tokens: int
    cu_units: Tensor
    unit_offsets: Tensor
    teacher_unit_offsets: Tensor
    device_unit_offsets: Tensor
    teacher_device_unit_offsets: Tensor
    plan: Tensor
    device_plan: Tensor

    @classmethod
    def build(
        cls,
        cu_seqlens: Counts,
        *,
        segments: int = 2,
        teacher_cu_seqlens: Counts | None = None,
        cu_units: Counts | None = None,
        unit_of_token: Counts | None = None,
        teacher_unit_of_token: Counts | None = None,
        device: torch.device | str = "cpu",
    ) -> MapLayout:
        """Validates a batch's segments and units and prepares what the implementations need.

        Args:
            cu_seqlens: (num_segments + 1,) cumulative student tokens, starting at 0; the segments of an example follow
                one another. Like all the following: a list of ints or an integer tensor on the host.
            segments: segments per example; divides num_segments.
            teacher_cu_seqlens: (num_segments + 1,) cumulative teacher tokens. Default: as the student's.
            cu_units: (num_segments + 1,) cumulative units. Default: counted from the units of the tokens.
            unit_of_token: (total_tokens,) unit row of each student token, counted over the whole batch, non-decreasing.
                Default: a unit is a token.
            teacher_unit_of_token: (teacher_total_tokens,) likewise. Default: as the student's, for equal cu_seqlens.
            device: where the device tensors live; the device of q and k.

        Raises:
            TypeError: an argument is not made of integers, or lies on another device than the host.
            ValueError: counts that do not start at 0 or decrease, a unit without tokens on either side or in another
                segment than its token, or sides whose counts do not fit; the message names the argument and the place.
        """
        if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
            raise ValueError(f"segments: expected a positive int, got {segments!r}")
        cu_seqlens = _cumulative("cu_seqlens", cu_seqlens)
        num_segments = len(cu_seqlens) - 1
        if num_segments % segments:
            raise ValueError(
                f"cu_seqlens: expected a multiple of segments={segments} segments, got {num_segments} segments"
            )
        if teacher_cu_seqlens is None:
            teacher_cu_seqlens = cu_seqlens
        else:
            teacher_cu_seqlens = _cumulative("teacher_cu_seqlens", teacher_cu_seqlens)
            if len(teacher_cu_seqlens) != len(cu_seqlens):
                raise ValueError(
                    f"teacher_cu_seqlens: expected {len(cu_seqlens)} entries as in cu_seqlens, "
                    f"got {len(teacher_cu_seqlens)}"
                )
        same_counts = torch.equal(cu_seqlens, teacher_cu_seqlens)
        total_tokens = int(cu_seqlens[-1])
        if unit_of_token is None:
            units = torch.arange(total_tokens)
        else:
            units = integers("unit_of_token", unit_of_token)
        if teacher_unit_of_token is None:
            if not same_counts:
                raise ValueError(
                    "teacher_unit_of_token: expected the unit of each teacher token, since teacher_cu_seqlens differs "
                    "from cu_seqlens; got None"
                )
            teacher_units = units
        else:
            teacher_units = integers("teacher_unit_of_token", teacher_unit_of_token)
        if cu_units is None:
            cu_units = _counted_units(cu_seqlens, units)
        else:
            cu_units = _cumulative("cu_units", cu_units)
            if len(cu_units) != len(cu_seqlens):
                raise ValueError(f"cu_units: expected {len(cu_seqlens)} entries as in cu_seqlens, got {len(cu_units)}")
        if unit_of_token is None and not torch.equal(cu_units, cu_seqlens):
            raise ValueError(
                "unit_of_token: expected the unit of each token, since cu_units differs from cu_seqlens; got None"
            )
        unit_offsets = _unit_offsets("unit_of_token", units, cu_seqlens, cu_units)
        teacher_unit_offsets = _unit_offsets("teacher_unit_of_token", teacher_units, teacher_cu_seqlens, cu_units)
        units_of_examples = cu_units[::segments].diff()
        plan = make_plan(segments, cu_units, unit_offsets, teacher_unit_offsets)
        return cls(
            segments=segments,
            num_examples=num_segments // segments,
            total_tokens=total_tokens,
            teacher_total_tokens=int(teacher_cu_seqlens[-1]),
            total_units=int(cu_units[-1]),
            max_units=_maximum(units_of_examples),
            max_unit_tokens=_maximum(unit_offsets.diff()),
            teacher_max_unit_tokens=_maximum(teacher_unit_offsets.diff()),
            cu_units=cu_units,
            unit_offsets=unit_offsets,
            teacher_unit_offsets=teacher_unit_offsets,
            device_unit_offsets=unit_offsets.to(device),
            teacher_device_unit_offsets=teacher_unit_offsets.to(device),
            plan=plan,
            device_plan=plan.to(device),
        )

    @classmethod
    def from_mask(cls, mask: Tensor) -> MapLayout:
        """The layout of a padded batch with one segment a row: mask is (B, N) bool, True for tokens that take part.

        Lives on the mask's device; reads the row lengths once. A unit is a token. For ``PackedAttention.from_padded``.
        """
        check_mask(mask)
        lengths = mask.sum(dim=1).cpu()
        return cls.build(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), segments=1, device=mask.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MapLayout:
        """The same layout with its device tensors on another device; what lives on the host stays there."""
        return dataclasses.replace(
            self,
            device_unit_offsets=self.device_unit_offsets.to(device, non_blocking=non_blocking),
            teacher_device_unit_offsets=self.teacher_device_unit_offsets.to(device, non_blocking=non_blocking),
            device_plan=self.device_plan.to(device, non_blocking=non_blocking),
        )

    @property
    def device(self) -> torch.device:
        """Where q, k and the distances of this batch live."""
        return self.device_unit_offsets.device

    @property
    def num_segments(self) -> int:
        """Segments of the whole batch."""
        return self.num_examples * self.segments


def check_mask(mask: Tensor) -> None:
    """Raises TypeError or ValueError unless mask is a (batch, tokens) bool tensor."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape (batch, tokens), got {tuple(mask.shape)}")


def integers(name: str, values: Counts) -> Tensor:
    """A copy (n,) int64 of a list of ints or an integer tensor on the host; raises TypeError or ValueError."""
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name}: expected a tensor on the host (cpu), got one on {values.device}")
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got dtype {values.dtype}")
        tensor = values.to(torch.int64, copy=True)
    elif not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of ints or an integer tensor, got {type(values).__name__}")
    else:
        values = list(values)
        if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in values):
            raise TypeError(f"{name}: expected integers, got {values[:8]!r}")
        tensor = torch.tensor(values, dtype=torch.int64)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
    return tensor


def _cumulative(name: str, values: Counts) -> Tensor:
    counts = integers(name, values)
    if len(counts) == 0 or counts[0] != 0:
        raise ValueError(f"{name}: expected cumulative counts that start at 0, got {counts[:4].tolist()}")
    decreasing = (counts.diff() < 0).nonzero()
    if len(decreasing):
        at = int(decreasing[0]) + 1
        raise ValueError(
            f"{name}: expected non-decreasing counts, got {int(counts[at])} after {int(counts[at - 1])} at entry {at}"
        )
    return counts


def _counted_units(cu_seqlens: Tensor, units: Tensor) -> Tensor:
    """Cumulative units of the segments, taken from the last unit of each; checked against the tokens afterwards."""
    if len(units) != int(cu_seqlens[-1]):
        raise ValueError(f"unit_of_token: expected {int(cu_seqlens[-1])} entries as in cu_seqlens, got {len(units)}")
    # An empty segment ends where the one before it does, and so counts no units.
    ends = torch.nn.functional.pad(units + 1, (1, 0))
    return ends[cu_seqlens]


def _unit_offsets(name: str, units: Tensor, cu_seqlens: Tensor, cu_units: Tensor) -> Tensor:
    """First token of every unit, after checking that each unit has tokens, in order, in its own segment."""
    total_tokens, total_units = int(cu_seqlens[-1]), int(cu_units[-1])
    if len(units) != total_tokens:
        raise ValueError(f"{name}: expected {total_tokens} entries, one a token, got {len(units)}")
    decreasing = (units.diff() < 0).nonzero()
    if len(decreasing):
        at = int(decreasing[0]) + 1
        raise ValueError(
            f"{name}: expected non-decreasing unit rows, got {int(units[at])} after {int(units[at - 1])} at token {at}"
        )
    segment_of_token = torch.repeat_interleave(cu_seqlens.diff())
    outside = ((units < cu_units[segment_of_token]) | (units >= cu_units[segment_of_token + 1])).nonzero()
    if len(outside):
        at = int(outside[0])
        segment = int(segment_of_token[at])
        raise ValueError(
            f"{name}: expected a unit of segment {segment} in [{int(cu_units[segment])}, {int(cu_units[segment + 1])}) "
            f"at token {at}, got {int(units[at])}"
        )
    enclosed = torch.cat([units.new_tensor([-1]), units, units.new_tensor([total_units])])
    gaps = (enclosed.diff() > 1).nonzero()
    if len(gaps):
        empty = int(enclosed[gaps[0]]) + 1
        raise ValueError(f"{name}: expected at least one token in every unit, unit {empty} has none")
    return torch.nn.functional.pad(torch.bincount(units, minlength=total_units).cumsum(0), (1, 0))


def _maximum(values: Tensor) -> int:
    return int(values.max()) if len(values) else 0
