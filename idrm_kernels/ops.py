"""torch.library registrations: private forward and backward ops of the loss and the distance, per implementation.

An op never chooses an implementation, so a dispatcher cannot override an explicit ``impl``. Fake registrations give
shapes to torch.compile; backward ops are ops too, so that compiled graphs hold them, and refuse to be differentiated.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from idrm_kernels.impl import chunked, reference
from idrm_kernels.impl.problem import LOSS_SCHEMA, SCHEMA, LossOptions, LossOutput, MapProblem

IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "torch": chunked}
if importlib.util.find_spec("triton") is not None:
    from idrm_kernels.impl import triton

    IMPLEMENTATIONS["triton"] = triton
try:
    from idrm_kernels.impl import cpp
except ImportError:  # not built here, or for another torch
    pass
else:
    IMPLEMENTATIONS["cpp"] = cpp


class Ops(NamedTuple):
    """The forward ops of one implementation, bound once."""

    distance: Callable[..., Tensor]
    loss: Callable[..., LossOutput]


def _without_autocast(function: Callable) -> Callable:
    """Autocast would cast the products inside of an op; the contract is that it casts nothing."""

    @functools.wraps(function)
    def wrapper(*arguments):
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return wrapper


def _refuse_second_derivative(ctx, *gradients):
    raise RuntimeError("idrm_kernels: differentiating the attention-map loss or distance twice is not supported")


def _define(name: str, schema: str, function: Callable, fake: Callable) -> Callable:
    qualified = f"idrm_kernels::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default")(_without_autocast(function))
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.idrm_kernels, name).default


def _distance_shape(*arguments) -> Tensor:
    problem = MapProblem(*arguments)
    shape = (problem.num_head_groups, problem.total_units, problem.segments)
    return problem.q.new_empty(shape, dtype=problem.dtype)


def _loss_shapes(problem: MapProblem, options: LossOptions) -> LossOutput:
    scalars = [problem.q.new_empty((), dtype=problem.dtype) for _ in range(3)]
    return LossOutput(*scalars, *problem.zero_gradients(problem.gradient_dtype, options.needs_grad))


def _gradient_shapes(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _register_distance(name: str, module: ModuleType) -> Callable:
    backward = _define(
        f"attention_map_distance_{name}_backward",
        f"(Tensor coefficients, {SCHEMA}) -> (Tensor, Tensor)",
        lambda coefficients, *arguments: module.distance_backward(coefficients, MapProblem(*arguments)),
        lambda coefficients, q, k, *rest: _gradient_shapes(q, k),
    )
    torch.library.register_autograd(backward, _refuse_second_derivative)
    forward = _define(
        f"attention_map_distance_{name}",
        f"({SCHEMA}) -> Tensor",
        lambda *arguments: module.distance(MapProblem(*arguments)),
        _distance_shape,
    )

    def setup_context(ctx, inputs, output):
        # A teacher run in inference mode gives tensors that autograd refuses to save; no graph can hold them either.
        ctx.is_saved = [isinstance(value, Tensor) and not value.is_inference() for value in inputs]
        ctx.save_for_backward(*itertools.compress(inputs, ctx.is_saved))
        ctx.arguments = [None if saved else value for saved, value in zip(ctx.is_saved, inputs, strict=True)]

    def differentiate(ctx, coefficients):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if own else value for own, value in zip(ctx.is_saved, ctx.arguments, strict=True)]
        dq, dk = backward(coefficients, *inputs)
        return dq, dk, *(None for _ in inputs[2:])

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    return forward


def _register_loss(name: str, module: ModuleType) -> Callable:
    num_options = len(LossOptions._fields)

    def split(arguments) -> tuple[MapProblem, LossOptions]:
        return MapProblem(*arguments[:-num_options]), LossOptions(*arguments[-num_options:])

    def scaled(gradient: Tensor, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (dq * gradient).to(q.dtype), (dk * gradient).to(k.dtype)

    backward = _define(
        f"attention_map_loss_{name}_backward",
        # q and k are inputs so that the gradients depend on them in a graph: a second derivative then raises, where
        # it would otherwise leave this part out and be wrong.
        "(Tensor gradient, Tensor dq, Tensor dk, Tensor q, Tensor k) -> (Tensor, Tensor)",
        scaled,
        lambda gradient, dq, dk, q, k: _gradient_shapes(q, k),
    )
    torch.library.register_autograd(backward, _refuse_second_derivative)
    forward = _define(
        f"attention_map_loss_{name}",
        f"({SCHEMA}, {LOSS_SCHEMA}) -> (Tensor loss, Tensor intra, Tensor inter, Tensor dq, Tensor dk)",
        lambda *arguments: module.loss(*split(arguments)),
        lambda *arguments: _loss_shapes(*split(arguments)),
    )

    def setup_context(ctx, inputs, output):
        problem, options = split(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[3:], problem.q, problem.k)
        ctx.has_gradients = options.needs_grad
        ctx.num_inputs = len(inputs)

    def differentiate(ctx, gradient, *others):
        if not ctx.has_gradients:
            raise RuntimeError("idrm_kernels: backward of a loss that was computed with needs_grad=False")
        dq, dk = backward(gradient, *ctx.saved_tensors)
        return dq, dk, *(None for _ in range(ctx.num_inputs - 2))

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    return forward


OPS = {
    name: Ops(_register_distance(name, module), _register_loss(name, module))
    for name, module in IMPLEMENTATIONS.items()
}
