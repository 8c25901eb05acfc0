"""attention_map_rows against the oracle's whole maps."""

import dataclasses

import pytest
import torch

from idrm_kernels import attention_map_rows
from idrm_kernels.testing.cases import Case, make_problem
from idrm_kernels.testing.oracle import example_units, unit_map


@pytest.mark.parametrize("teacher_side", [False, True])
@pytest.mark.parametrize("normalization", ["block", "joint"])
@pytest.mark.parametrize("rows", [[0, 11, 12, 15], [*range(16), 3, 3, 2]], ids=["a few", "all, and some again"])
def test_rows_equal_the_oracle(rows, normalization, teacher_side):
    case = Case(lengths=((7, 5), (0, 4)), merged=True, bias="both", num_head_groups=2, dtype=torch.float64, seed=3)
    problem = make_problem(case)
    model = problem.teacher if teacher_side else problem.student
    result = attention_map_rows(
        model,
        problem.layout,
        torch.tensor(rows),
        normalization=normalization,
        num_head_groups=2,
        teacher_side=teacher_side,
    )
    for row, own in zip(rows, result, strict=True):
        example, first = (0, 0) if row < 12 else (1, 12)
        units, segments = example_units(problem.layout, example, teacher_side)
        supports = [list(range(len(units)))] if normalization == "joint" else [units for units in segments if units]
        heads = model.q.shape[1] // 2
        expected = [unit_map(model, units, supports, range(g * heads, (g + 1) * heads))[row - first] for g in range(2)]
        torch.testing.assert_close(own, torch.stack(expected), rtol=1e-9, atol=1e-12)
        assert own.sum(-1) == pytest.approx([float(len(supports))] * 2)


def test_rows_carry_no_gradient():
    problem, _, _ = make_problem(Case()).leaves()
    (row,) = attention_map_rows(problem.student, problem.layout, [0])
    assert not row.requires_grad
    assert row.shape == (1, 12)
    assert row.dtype == torch.float32
    half = dataclasses.replace(problem.student, q=problem.student.q.half(), k=problem.student.k.half())
    assert attention_map_rows(half, problem.layout, [0])[0].dtype == torch.float32


def test_rows_of_either_side_keep_the_position_bias():
    """Where a unit is a token the two sides have the same tokens, so the side makes no difference."""
    problem = make_problem(Case(bias="both", dtype=torch.float64))
    by_side = [
        attention_map_rows(problem.teacher, problem.layout, [3, 15], teacher_side=side) for side in (False, True)
    ]
    plain = dataclasses.replace(problem.teacher, position_bias=None)
    for own, teacher, without in zip(*by_side, attention_map_rows(plain, problem.layout, [3, 15]), strict=True):
        assert torch.equal(own, teacher)
        assert not torch.allclose(own, without)
