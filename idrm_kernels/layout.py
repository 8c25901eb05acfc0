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
        num_examples, teacher_total_tokens, total_units: sizes of the batch.
        total_tokens: rows of the student's q and k; a shared prefix counts once.
        max_units: units of the largest example, all its segments together (the side of StoredMaps).
        max_unit_tokens, teacher_max_unit_tokens: tokens of the largest unit on either side.
        cu_units: (num_segments + 1,) int64 on the host, cumulative units.
        unit_offsets: (total_units + 1,) int64 on the host; unit a holds the student's tokens
            unit_offsets[a]:unit_offsets[a + 1], so segment s begins at token unit_offsets[cu_units[s]]. Every segment's
            tokens are counted whole, with a prefix that it shares.
        teacher_unit_offsets: the same for the teacher's tokens.
        device_unit_offsets, teacher_device_unit_offsets: the two on the device of q and k.
        shared_units: (num_examples,) int64 on the host: so many units at the beginning of all segments of an example
            are the same student tokens, which q and k hold once.
        token_index: (unit_offsets[-1],) int64 on the host: the row of q and k that holds each token. None where nothing
            is shared: token t is row t.
        device_token_index: the same on the device of q and k.
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
    shared_units: Tensor
    token_index: Tensor | None
    device_token_index: Tensor | None
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
        shared_prefix_lens: Counts | None = None,
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
            shared_prefix_lens: (num_examples,) student tokens that all segments of an example begin with, the same
                tokens in the same states, as the prompt is of a preference pair under causal attention. The student's q
                and k hold them once, before the rest of each segment: [prefix, rest of segment 0, rest of segment 1,
                ...], example after example. All other arguments count them in every segment, and every result is that
                of a batch without sharing, its gradients summed over the segments. Default: 0.
            device: where the device tensors live; the device of q and k.

        Raises:
            TypeError: an argument is not made of integers, or lies on another device than the host.
            ValueError: counts that do not start at 0 or decrease, a unit without tokens on either side or in another
                segment than its token, sides whose counts do not fit, or a shared prefix that is longer than a segment,
                ends within a unit or has other units in another segment; the message names the argument and the place.
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
        if unit_of_token is None:
            units = torch.arange(int(cu_seqlens[-1]))
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
        shared_units, token_index = _shared_prefixes(shared_prefix_lens, segments, cu_seqlens, cu_units, unit_offsets)
        units_of_examples = cu_units[::segments].diff()
        plan = make_plan(segments, cu_units, unit_offsets, teacher_unit_offsets, shared_units)
        return cls(
            segments=segments,
            num_examples=num_segments // segments,
            total_tokens=int(cu_seqlens[-1]) if token_index is None else _maximum(token_index) + 1,
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
            shared_units=shared_units,
            token_index=token_index,
            device_token_index=None if token_index is None else token_index.to(device),
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
        index = self.device_token_index
        return dataclasses.replace(
            self,
            device_unit_offsets=self.device_unit_offsets.to(device, non_blocking=non_blocking),
            teacher_device_unit_offsets=self.teacher_device_unit_offsets.to(device, non_blocking=non_blocking),
            device_token_index=None if index is None else index.to(device, non_blocking=non_blocking),
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


def _shared_prefixes(
    lengths: Counts | None, segments: int, cu_seqlens: Tensor, cu_units: Tensor, unit_offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """MapLayout's shared_units and token_index, after checking that the prefixes are whole units, alike everywhere."""
    name = "shared_prefix_lens"
    num_examples = (len(cu_seqlens) - 1) // segments
    shared_units = torch.zeros(num_examples, dtype=torch.int64)
    if lengths is None:
        return shared_units, None
    lengths = integers(name, lengths)
    if len(lengths) != num_examples:
        raise ValueError(f"{name}: expected {num_examples} entries, one an example, got {len(lengths)}")
    starts = cu_seqlens[:-1].view(-1, segments)
    for example, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        shortest = int(cu_seqlens.diff().view(-1, segments)[example].min())
        if not 0 < length <= shortest:
            raise ValueError(
                f"{name}: expected a length in [0, {shortest}], the tokens of the shortest segment of example "
                f"{example}, got {length}"
            )
        ends = []
        for segment, start in enumerate(starts[example].tolist(), start=example * segments):
            own = unit_offsets[cu_units[segment] : cu_units[segment + 1] + 1] - start
            count = int(torch.searchsorted(own, length))
            if own[count] != length:
                raise ValueError(
                    f"{name}: expected the prefix of example {example} to end where a unit of segment {segment} does, "
                    f"got {length} tokens, within a unit of tokens {int(own[count - 1])} to {int(own[count]) - 1}"
                )
            ends.append(own[1 : count + 1])
        for other, end in enumerate(ends):
            if not torch.equal(end, ends[0]):
                raise ValueError(
                    f"{name}: expected the same units in the prefix of all segments of example {example}, got units "
                    f"that end after {ends[0][:8].tolist()} and, in segment {example * segments + other}, "
                    f"{end[:8].tolist()} tokens"
                )
        shared_units[example] = len(ends[0])
    # A segment alone has everything once.
    if segments == 1 or not lengths.any():
        return torch.zeros_like(shared_units), None
    segment_of_token = torch.repeat_interleave(cu_seqlens.diff())
    place = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[segment_of_token]
    rest = cu_seqlens.diff() - lengths.repeat_interleave(segments)
    # In q and k an example has its prefix and the rest of every segment; rest_starts counts to where a rest begins.
    examples = torch.nn.functional.pad((lengths + rest.view(-1, segments).sum(1)).cumsum(0), (1, 0))[:-1]
    by_example = rest.view(-1, segments)
    rest_starts = ((examples + lengths)[:, None] + by_example.cumsum(1) - by_example).flatten()
    own_length = lengths[segment_of_token // segments]
    index = torch.where(
        place < own_length,
        examples[segment_of_token // segments] + place,
        rest_starts[segment_of_token] + place - own_length,
    )
    return shared_units, index


def _maximum(values: Tensor) -> int:
    return int(values.max()) if len(values) else 0
