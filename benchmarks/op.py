"""The fused loss, forward and with its gradients, beside the naive loss and beside attention itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import roof
from benchmarks.contest import DTYPES, REPEATED
from benchmarks.measurement import peak_rise
from idrm_kernels import (
    MapLayout,
    PackedAttention,
    StoredMaps,
    attention_map_loss,
    available_implementations,
)
from idrm_kernels.testing.cases import Case, Problem, error_bound, make_problem
from idrm_kernels.testing.comparison import naive_loss
from idrm_kernels.testing.memory import peak_bytes

YARDSTICK = "sdpa"
NAIVE = "naive"
NAIVE_COMPILED = "naive-compiled"
TEACHER_HEADS, TEACHER_HEAD_DIM = 16, 64
# Lengths at which results are checked by the tests' rule, and from which quadratic memory is foretold.
CHECKED_LENGTH, FORETOLD_FROM = 320, 256
# Of the largest value, in roundings of the dtype: the naive loss bounds the others' errors, and so has a bound itself.
NAIVE_ROUNDINGS = 64
# Where one slab of the default workspace holds a query segment's distances (docs/kernels.md).
LONGEST_OF_ONE_SWEEP = 3971


@dataclasses.dataclass(frozen=True)
class OpContest:
    """``attention_map_loss`` of one pair with ``length`` units a sequence, frobenius, heads averaged.

    Variants: the naive loss as a user writes it (products in the inputs' dtype, softmax in float32, every map held),
    the same compiled, the implementations of ``idrm_kernels``, and as a yardstick SDPA over the pair's tokens, forward
    and backward for the student's heads and forward for the teacher's. Where a prefix is shared, an implementation
    whose name ends in "-repeated" gets the same pair with the prefix in both sequences.

    Attributes:
        passes: "forward" (no input needs grad) or "forward_backward" (loss, dq and dk).
        teacher: "packed", "bias" (packed with DeBERTa's position tables) or "stored".
        units: "tokens" (a unit is one token of both), or "merged" (one or two of the student's, one to three of the
            teacher's: 1.5 and 2 times as many tokens as units).
        shared: share of a sequence's units in the prefix that both share, which q and k hold once.
    """

    device: str
    dtype: str
    num_heads: int
    head_dim: int
    length: int
    passes: str = "forward_backward"
    num_kv_heads: int | None = None
    teacher: str = "packed"
    units: str = "tokens"
    normalization: str = "block"
    shared: float = 0.0

    @property
    def suite(self) -> str:
        return "op"

    @property
    def name(self) -> str:
        parts = [self.device, self.dtype, f"{self.num_heads}x{self.head_dim}", f"2x{self.length}"]
        defaults = OpContest(self.device, self.dtype, self.num_heads, self.head_dim, self.length)
        for option in ("passes", "num_kv_heads", "teacher", "units", "normalization"):
            if getattr(self, option) != getattr(defaults, option):
                parts.append(f"kv{self.num_kv_heads}" if option == "num_kv_heads" else getattr(self, option))
        if self.shared:
            parts.append(f"shared-{100 * self.shared:.0f}")
        return "-".join(parts)

    def variants(self, names: tuple[str, ...]) -> Mapping[str, Callable[[], object]]:
        problem, *_ = _problem(self).leaves()
        apart, *_ = _problem(self).repeated().leaves()
        problems = {name: apart if name.endswith(REPEATED) else problem for name in names}
        if self.passes == "forward":
            for used in (problem, apart):
                used.student.q.requires_grad_(False)
                used.student.k.requires_grad_(False)
        return {name: self._call(name, used) for name, used in problems.items()}

    def check(self, variant: str) -> str | None:
        """Loss, dq and dk against ``reference`` in float64, up to 2 x 320 tokens, under the tests' error rule."""
        if variant == YARDSTICK:
            return None
        if variant not in (NAIVE, NAIVE_COMPILED) and variant.removesuffix(REPEATED) not in available_implementations():
            return f"{variant} is not available here"
        checked = dataclasses.replace(self, length=min(self.length, CHECKED_LENGTH), passes="forward_backward")
        return _failure(checked, variant)

    def check_result(self, variant: str, result: tuple[Tensor, ...]) -> str | None:
        """Half the dtype's digits of ``torch`` in float32, in the norm: what a tile too few or too many would cost."""
        if variant == YARDSTICK:
            return None
        tolerance = torch.finfo(DTYPES[self.dtype]).eps ** 0.5
        result = self._by_row(result)
        for output, value, expected in zip(("loss", "dq", "dk"), result, _expected(self), strict=False):
            error = ((value.float() - expected).norm() / expected.norm()).item()
            if not error <= tolerance:
                return f"{output} of {self.name} is off by {error:.2g} of its norm, expected at most {tolerance:.2g}"
        return None

    def needed_bytes(self, variant: str) -> int | None:
        if variant not in (NAIVE, NAIVE_COMPILED) or self.length <= FORETOLD_FROM:
            return None
        small = dataclasses.replace(self, length=FORETOLD_FROM)
        return int(_bytes_of(small, variant) * (self.length / FORETOLD_FROM) ** 2)

    def roof_seconds(self, variant: str) -> float | None:
        counts = roof.COUNTS.get((variant, self.passes))
        if (
            self.shared
            or counts is None
            or (self.teacher, self.units, self.normalization) != ("packed", "tokens", "block")
        ):
            return None
        if variant == "triton" and self.length > LONGEST_OF_ONE_SWEEP:
            return None
        entries = (2 * self.length) ** 2
        sides = ((self.num_heads, self.head_dim), (TEACHER_HEADS, TEACHER_HEAD_DIM))
        return roof.seconds(self.device, self.dtype, [(entries * heads, d) for heads, d in sides], counts)

    def _call(self, variant: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
        """A call that returns the loss and, with a backward pass, dq and dk."""
        inputs = (problem.student, problem.teacher, problem.layout)
        q, k = problem.student.q, problem.student.k
        incoming = torch.ones((), device=self.device)
        if variant == YARDSTICK:
            compute = functools.partial(_attention, *inputs)
            incoming = torch.randn((1, q.shape[1], q.shape[0], q.shape[2]), device=self.device).to(q.dtype)
        elif variant == NAIVE:
            compute = functools.partial(naive_loss, *inputs, normalization=self.normalization)
        elif variant == NAIVE_COMPILED:
            torch._dynamo.reset()  # it compiles one function for a few shapes only, then falls back to eager
            compiled = torch.compile(naive_loss, dynamic=False)
            compute = functools.partial(compiled, *inputs, normalization=self.normalization)
        else:

            def compute():
                impl = variant.removesuffix(REPEATED)
                return attention_map_loss(*inputs, normalization=self.normalization, impl=impl).loss

        def call() -> tuple[Tensor, ...]:
            result = compute()
            if self.passes == "forward":
                return (result,)
            return result.detach(), *torch.autograd.grad(result, (q, k), incoming.to(result.dtype))

        return call

    def _by_row(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Loss and gradients with those of a repeated prefix summed, as where it is shared."""
        layout = _problem(self).layout
        loss, *gradients = result
        if layout.device_token_index is not None:
            gradients = [
                gradient
                if len(gradient) == layout.total_tokens
                else gradient.new_zeros(layout.total_tokens, *gradient.shape[1:]).index_add_(
                    0, layout.device_token_index, gradient
                )
                for gradient in gradients
            ]
        return loss, *gradients


def _attention(student: PackedAttention, teacher: PackedAttention | StoredMaps, layout: MapLayout) -> Tensor:
    """SDPA over all tokens of the pair, with the keys as values: what attention over them costs a model anyway."""

    def heads(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)[None]

    if isinstance(teacher, PackedAttention):
        scaled_dot_product_attention(heads(teacher.q), heads(teacher.k), heads(teacher.k))
    q, k = heads(student.q), heads(student.k)
    return scaled_dot_product_attention(q, k, k, enable_gqa=q.shape[1] != k.shape[1])


@functools.lru_cache(maxsize=2)
def _problem(contest: OpContest) -> Problem:
    case = Case(
        lengths=((contest.length, contest.length),),
        num_heads=contest.num_heads,
        num_kv_heads=contest.num_kv_heads or contest.num_heads,
        head_dim=contest.head_dim,
        teacher_heads=TEACHER_HEADS,
        teacher_head_dim=TEACHER_HEAD_DIM,
        dtype=DTYPES[contest.dtype],
        merged=contest.units == "merged",
        teacher="stored" if contest.teacher == "stored" else "packed",
        bias="both" if contest.teacher == "bias" else "none",
        bias_slots=512,
        normalization=contest.normalization,
        shared=(round(contest.shared * contest.length),) if contest.shared else (),
    )
    return make_problem(case, contest.device)


@functools.cache
def _failure(contest: OpContest, variant: str) -> str | None:
    """The first of loss, dq and dk whose error against float64 is above its bound."""
    results = _results(contest, variant)
    exact = _results(contest, "exact")
    versions = [_results(contest, name) for name in (NAIVE, "reference")]
    eps = torch.finfo(DTYPES[contest.dtype]).eps
    for index, output in enumerate(("loss", "dq", "dk")):
        error = (results[index] - exact[index]).abs().max().item()
        if variant == NAIVE:
            bound = min(NAIVE_ROUNDINGS * eps, 0.1) * exact[index].abs().max().item()
        else:
            bound = max(error_bound(version[index], exact[index], eps).item() for version in versions)
        if not error <= bound:
            return f"{output} of {contest.name} is off by {error:.2g}, expected at most {bound:.2g}"
    return None


@functools.cache
def _results(contest: OpContest, variant: str) -> tuple[Tensor, ...]:
    """Loss, dq and dk in float64 on the CPU; "exact" computes them in float64."""
    problem = _problem(contest)
    if variant.endswith(REPEATED):
        problem = problem.repeated()
    problem, _, _ = (problem.to(torch.float64) if variant == "exact" else problem).leaves()
    call = contest._call("reference" if variant == "exact" else variant, problem)
    return tuple(result.double().cpu() for result in contest._by_row(call()))


@functools.lru_cache(maxsize=1)
def _expected(contest: OpContest) -> tuple[Tensor, ...]:
    """Loss, dq and dk by ``torch`` in float32 on the contest's values; of a forward pass the loss alone."""
    problem, q, k = _problem(contest).to(torch.float32).leaves()
    options = {"normalization": contest.normalization, "impl": "torch"}
    loss = attention_map_loss(problem.student, problem.teacher, problem.layout, **options).loss
    if contest.passes == "forward":
        return (loss.detach(),)
    return loss.detach(), *torch.autograd.grad(loss, (q, k))


@functools.cache
def _bytes_of(contest: OpContest, variant: str) -> int:
    (call,) = contest.variants((variant,)).values()
    call()
    # By torch's allocator: how much of what is freed a process keeps would be scaled as well.
    return peak_bytes(call) if contest.device == "cpu" else peak_rise(call, contest.device)[1]
