"""attention_map_rows against the oracle's whole maps."""

import dataclasses

import pytest
import torch

from idrm_kernels import StoredMaps, attention_map_loss, attention_map_rows
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


@pytest.mark.parametrize("normalization", ["block", "joint"])
def test_consecutive_rows_are_those_asked_for_one_by_one(normalization):
    """Across segments, an empty one too, and examples; of all rows, StoredMaps give the loss of the teacher itself."""
    problem = make_problem(Case(lengths=((70, 5), (0, 4), (3, 3)), merged=True, bias="both", dtype=torch.float64))
    layout, options = problem.layout, {"normalization": normalization, "teacher_side": True}
    rows = [*range(layout.total_units), 4, 5, 3]
    together = attention_map_rows(problem.teacher, layout, rows, **options)
    assert len(together) == len(rows)
    for row, own in zip(rows, together, strict=True):
        (alone,) = attention_map_rows(problem.teacher, layout, [row], **options)
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-15)
    maps = problem.teacher.q.new_zeros(layout.num_examples, 1, layout.max_units, layout.max_units)
    first = 0
    for example in range(layout.num_examples):
        units = together[first].shape[-1]
        maps[example, 0, :units, :units] = torch.cat(together[first : first + units])
        first += units
    losses = [
        attention_map_loss(problem.student, teacher, layout, normalization=normalization).loss.item()
        for teacher in (problem.teacher, StoredMaps(maps.float()))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


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
