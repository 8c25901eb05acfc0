"""Ragged random problems: the cases that tests of every implementation run, and the error rule they are held to."""

from __future__ import annotations

import dataclasses
import itertools
from collections import ChainMap
from random import Random

import torch
from torch import Tensor

from idrm_kernels.inputs import DisentangledBias, PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem and the options to run it with.

    Attributes:
        lengths: units of every segment of every example.
        shared: units of the prefix that the segments of every example share, kept once in q and k; () shares nothing.
        peak: factor on q; large values make peaked maps (attention sinks).
        merged: whether units hold several tokens, different numbers on both sides.
        bias: "none", "both", "c2p" or "p2c", by tables of bias_slots slots.
    """

    lengths: tuple[tuple[int, ...], ...] = ((7, 5), (1, 9))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    teacher_heads: int = 2
    teacher_head_dim: int = 4
    dtype: torch.dtype = torch.float32
    merged: bool = False
    shared: tuple[int, ...] = ()
    teacher: str = "packed"
    bias: str = "none"
    bias_slots: int = 5
    causal: bool = False
    metric: str = "l2"
    normalization: str = "block"
    num_head_groups: int = 1
    reduction: str = "frobenius"
    weighted: bool = False
    intra_weight: float = 1.0
    inter_weight: float = 1.0
    peak: float = 1.0
    softmax_scale: float | None = None
    seed: int = 0

    @property
    def map_options(self) -> dict:
        """Keyword arguments of the distance."""
        return {
            "metric": self.metric,
            "normalization": self.normalization,
            "num_head_groups": self.num_head_groups,
        }

    @property
    def loss_options(self) -> dict:
        """Keyword arguments of the loss beyond those of the distance and the row weights."""
        return {
            "reduction": self.reduction,
            "intra_weight": self.intra_weight,
            "inter_weight": self.inter_weight,
        }


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    student: PackedAttention
    teacher: PackedAttention | StoredMaps
    layout: MapLayout
    row_weights: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype (rounded values stay as they are)."""

        def cast(attention: PackedAttention) -> PackedAttention:
            bias = attention.position_bias
            if bias is not None:
                tables = {name: None if table is None else table.to(dtype) for name, table in bias_tables(bias)}
                bias = dataclasses.replace(bias, **tables)
            return dataclasses.replace(attention, q=attention.q.to(dtype), k=attention.k.to(dtype), position_bias=bias)

        stored = isinstance(self.teacher, StoredMaps)
        teacher = StoredMaps(self.teacher.maps.to(dtype)) if stored else cast(self.teacher)
        return dataclasses.replace(self, student=cast(self.student), teacher=teacher)

    def repeated(self) -> Problem:
        """The same problem with shared prefixes once a segment in q and k, and a layout that shares nothing."""
        layout = self.layout
        if layout.device_token_index is None:
            return self
        sides = [
            (offsets[layout.cu_units], torch.repeat_interleave(offsets.diff()))
            for offsets in (layout.unit_offsets, layout.teacher_unit_offsets)
        ]
        (cu_seqlens, units), (teacher_cu_seqlens, teacher_units) = sides
        apart = MapLayout.build(
            cu_seqlens,
            segments=layout.segments,
            teacher_cu_seqlens=teacher_cu_seqlens,
            cu_units=layout.cu_units,
            unit_of_token=units,
            teacher_unit_of_token=teacher_units,
            device=layout.device,
        )
        q, k = (tensor[layout.device_token_index] for tensor in (self.student.q, self.student.k))
        return dataclasses.replace(self, student=dataclasses.replace(self.student, q=q, k=k), layout=apart)

    def leaves(self) -> tuple[Problem, Tensor, Tensor]:
        """The problem with fresh student.q and student.k that require grad, and these two."""
        q, k = (tensor.detach().clone().requires_grad_() for tensor in (self.student.q, self.student.k))
        return dataclasses.replace(self, student=dataclasses.replace(self.student, q=q, k=k)), q, k


def bias_tables(bias: DisentangledBias) -> list[tuple[str, Tensor | None]]:
    """The names and values of the two tables."""
    return [("c2p", bias.c2p), ("p2c", bias.p2c)]


def make_problem(case: Case, device: torch.device | str = "cpu") -> Problem:
    """The tensors of a case, from its seed alone."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=case.dtype)

    layout, teacher_positions = make_layout(case, generator, device)
    q = normal(layout.total_tokens, case.num_heads, case.head_dim) * case.peak
    k = normal(layout.total_tokens, case.num_kv_heads, case.head_dim)
    student = PackedAttention(q, k, case.softmax_scale, causal=case.causal)
    if case.teacher == "stored":
        maps = torch.zeros(layout.num_examples, case.num_head_groups, layout.max_units, layout.max_units)
        for example in range(layout.num_examples):
            bounds = layout.cu_units[example * layout.segments : (example + 1) * layout.segments + 1].tolist()
            size = bounds[-1] - bounds[0]
            scores = torch.randn(case.num_head_groups, size, size, generator=generator) * case.peak
            parts = [(a - bounds[0], b - bounds[0]) for a, b in itertools.pairwise(bounds)]
            parts = [(0, size)] if case.normalization == "joint" else parts
            maps[example, :, :size, :size] = torch.cat([scores[..., a:b].softmax(-1) for a, b in parts], dim=-1)
        stored_dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
        teacher = StoredMaps(maps.to(device=device, dtype=stored_dtype))
    else:
        teacher_q = normal(layout.teacher_total_tokens, case.teacher_heads, case.teacher_head_dim) * case.peak
        teacher_k = normal(layout.teacher_total_tokens, case.teacher_heads, case.teacher_head_dim)
        bias = None
        if case.bias != "none":
            max_delta = case.bias_slots // 2 + 1
            tables = [normal(layout.teacher_total_tokens, case.teacher_heads, case.bias_slots) for _ in range(2)]
            slot_of_delta = torch.randint(case.bias_slots, (2 * max_delta + 1,), generator=generator, dtype=torch.int32)
            bias = DisentangledBias(
                positions=teacher_positions.to(device=device, dtype=torch.int32),
                slot_of_delta=slot_of_delta.to(device),
                c2p=tables[0] if case.bias in ("both", "c2p") else None,
                p2c=tables[1] if case.bias in ("both", "p2c") else None,
            )
        teacher = PackedAttention(teacher_q, teacher_k, position_bias=bias, causal=case.causal)
    weights = torch.rand(layout.total_units, generator=generator).to(device) if case.weighted else None
    return Problem(student, teacher, layout, weights)


def make_layout(case: Case, generator: torch.Generator, device: torch.device | str) -> tuple[MapLayout, Tensor]:
    """The layout of a case and the teacher tokens' positions in a joint input with specials between the segments."""
    lengths = [length for example in case.lengths for length in example]
    segments = len(case.lengths[0]) if case.lengths else 2
    cu_units = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()] if lengths else [0]
    total_units = cu_units[-1]
    sides, shared_prefix_lens = [], None
    for side, most in enumerate((2, 3) if case.merged else (1, 1)):
        tokens = torch.randint(1, most + 1, (total_units,), generator=generator)
        if case.shared and side == 0:
            shared_prefix_lens = share_prefixes(tokens, case.shared, cu_units, segments)
        cumulative = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        sides.append((cumulative[torch.tensor(cu_units)], torch.arange(total_units).repeat_interleave(tokens)))
    (cu_seqlens, units), (teacher_cu_seqlens, teacher_units) = sides
    layout = MapLayout.build(
        cu_seqlens,
        segments=segments,
        teacher_cu_seqlens=teacher_cu_seqlens,
        cu_units=cu_units,
        unit_of_token=units,
        teacher_unit_of_token=teacher_units,
        shared_prefix_lens=shared_prefix_lens,
        device=device,
    )
    starts = teacher_cu_seqlens[:-1:segments].repeat_interleave(
        teacher_cu_seqlens[::segments].diff(), output_size=int(teacher_cu_seqlens[-1])
    )
    segment = torch.repeat_interleave(teacher_cu_seqlens.diff()) % segments
    return layout, torch.arange(int(teacher_cu_seqlens[-1])) - starts + segment + 1


def share_prefixes(tokens: Tensor, shared: tuple[int, ...], cu_units: list[int], segments: int) -> list[int]:
    """Gives the first units of all segments of an example the first one's token counts, in place; their sums."""
    lengths = []
    for example, units in enumerate(shared):
        starts = cu_units[example * segments : (example + 1) * segments]
        own = tokens[starts[0] : starts[0] + units].clone()
        for start in starts:
            tokens[start : start + units] = own
        lengths.append(int(own.sum()))
    return lengths


# What pairwise_cases combines: fields of Case, alternatives that belong together in one.
OPTIONS = {
    "dtype": [{"dtype": dtype} for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    "lengths": [
        {"lengths": ((127,), (1,))},
        {"lengths": ((63,), (64,), (7,)), "causal": True},
        {"lengths": ((1, 64), (7, 0), (0, 0))},
        {"lengths": ((63, 7, 0), (0, 3, 2))},
        {"lengths": ((70, 69), (5, 3)), "shared": (66, 3)},
    ],
    "teacher": [{"bias": bias} for bias in ("none", "both", "c2p", "p2c")] + [{"teacher": "stored"}],
    "metric": [{"metric": metric} for metric in ("l2", "kl")],
    "normalization": [{"normalization": normalization} for normalization in ("block", "joint")],
    "reduction": [{"reduction": reduction} for reduction in ("frobenius", "row", "row_sq")],
    "units": [{"merged": merged} for merged in (False, True)],
    "groups": [{"num_head_groups": groups} for groups in (1, 2)],
    "kv_heads": [{"num_kv_heads": heads} for heads in (1, 2)],
    "head_dim": [{"head_dim": head_dim} for head_dim in (32, 64, 80)],
    "weights": [{"weighted": False}, {"weighted": True}, {"inter_weight": 0.0}, {"intra_weight": 0.3}],
    "peak": [{"peak": peak} for peak in (1.0, 12.0)],
}


def pairwise_cases() -> list[Case]:
    """Cases in which any two of OPTIONS' alternatives occur together at least once; the same at every call."""
    random = Random(0)
    missing = {
        frozenset(((one, i), (other, j)))
        for one, other in itertools.combinations(OPTIONS, 2)
        for i in range(len(OPTIONS[one]))
        for j in range(len(OPTIONS[other]))
    }
    cases = []
    while missing:
        # Candidates around a pair that is missing still; the one with the most such pairs is taken.
        wanted = dict(min(missing, key=sorted))
        candidates = [
            {name: wanted.get(name, random.randrange(len(choices))) for name, choices in OPTIONS.items()}
            for _ in range(200)
        ]
        covered = [set(map(frozenset, itertools.combinations(row.items(), 2))) & missing for row in candidates]
        best = max(range(len(candidates)), key=lambda index: len(covered[index]))
        missing -= covered[best]
        fields = [OPTIONS[name][index] for name, index in candidates[best].items()]
        cases.append(
            Case(num_heads=2, teacher_heads=2, teacher_head_dim=16, seed=len(cases), **dict(ChainMap(*fields)))
        )
    return cases


def error_bound(same_dtype: Tensor, exact: Tensor, eps: float) -> Tensor:
    """The error a kernel may make: twice a same-dtype PyTorch version's plus twice a rounding of the largest value."""
    own = (same_dtype.to(exact.dtype) - exact).abs().max()
    return 2 * (own + eps * exact.abs().max())
