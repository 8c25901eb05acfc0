"""Bad input is refused at the door, by the argument's name."""

import dataclasses

import pytest
import torch

from idrm_kernels import (
    PackedAttention,
    StoredMaps,
    attention_map_distance,
    attention_map_loss,
    attention_map_rows,
    available_implementations,
)
from idrm_kernels.testing.cases import Case, make_problem


def student_with(**changes):
    return lambda problem: dataclasses.replace(problem, student=dataclasses.replace(problem.student, **changes))


def teacher_with(**changes):
    return lambda problem: dataclasses.replace(problem, teacher=dataclasses.replace(problem.teacher, **changes))


def bias_with(**changes):
    def change(problem):
        bias = dataclasses.replace(problem.teacher.position_bias, **changes)
        return dataclasses.replace(problem, teacher=dataclasses.replace(problem.teacher, position_bias=bias))

    return change


TOKENS = 22  # of the default case

REFUSED = {
    "student is no attention": (
        lambda p: dataclasses.replace(p, student=p.student.q),
        TypeError,
        "student: expected a P",
    ),
    "teacher is no attention": (lambda p: dataclasses.replace(p, teacher=p.layout), TypeError, "teacher: expected a P"),
    "layout": (lambda p: dataclasses.replace(p, layout=[0, 1]), TypeError, "layout: expected a MapLayout"),
    "token count": (student_with(q=torch.zeros(5, 4, 8)), ValueError, r"student.q: expected shape \(22, heads"),
    "padded shape": (student_with(k=torch.zeros(1, TOKENS, 2, 8)), ValueError, "student.k: expected shape"),
    "integer q": (student_with(q=torch.zeros(TOKENS, 4, 8, dtype=torch.int32)), TypeError, "student.q: expected dtype"),
    "mixed dtypes": (student_with(k=torch.zeros(TOKENS, 2, 8).double()), TypeError, "student.k: expected the dtype of"),
    "head_dim": (student_with(k=torch.zeros(TOKENS, 2, 4)), ValueError, "student.k: expected head_dim 8"),
    "kv heads": (student_with(k=torch.zeros(TOKENS, 3, 8)), ValueError, "num_kv_heads that divides num_heads=4"),
    "scale": (student_with(softmax_scale=float("nan")), ValueError, "student.softmax_scale: expected a finite"),
    "scale type": (teacher_with(softmax_scale="x"), TypeError, "teacher.softmax_scale: expected a number"),
    "causal": (student_with(causal=True), ValueError, "student.causal: expected a layout with segments = 1"),
    "teacher causal": (teacher_with(causal=True), ValueError, "teacher.causal: expected a layout with segments = 1"),
    "device": (
        student_with(q=torch.zeros(TOKENS, 4, 8, device="meta")),
        ValueError,
        "student.q: expected a tensor on cpu",
    ),
    "teacher tokens": (teacher_with(q=torch.zeros(3, 2, 4)), ValueError, r"teacher.q: expected shape \(22"),
    "numpy": (student_with(q=[[1.0]]), TypeError, "student.q: expected a tensor, got list"),
    "student bias": (
        lambda p: dataclasses.replace(p, student=dataclasses.replace(p.student, position_bias=p.teacher.position_bias)),
        ValueError,
        "student.position_bias: expected None",
    ),
    "positions dtype": (bias_with(positions=torch.zeros(TOKENS)), TypeError, "positions: expected dtype torch.int32"),
    "positions shape": (
        bias_with(positions=torch.zeros(3, dtype=torch.int32)),
        ValueError,
        r"teacher.position_bias.positions: expected shape \(22,\)",
    ),
    "slots": (
        bias_with(slot_of_delta=torch.zeros(4, dtype=torch.int32)),
        ValueError,
        r"slot_of_delta: expected shape \(2 \* max_delta \+ 1,\)",
    ),
    "slot beyond the tables": (
        bias_with(slot_of_delta=torch.full((7,), 5, dtype=torch.int32)),
        ValueError,
        r"slot_of_delta: expected slots in \[0, 5\), got 5",
    ),
    "c2p shape": (bias_with(c2p=torch.zeros(TOKENS, 3, 5)), ValueError, r"c2p: expected shape \(22, 2, num_slots\)"),
    "p2c slots": (bias_with(p2c=torch.zeros(TOKENS, 2, 6)), ValueError, "p2c: expected the shape of c2p"),
    "maps shape": (
        lambda p: dataclasses.replace(p, teacher=StoredMaps(torch.zeros(2, 1, 12, 11))),
        ValueError,
        r"teacher.maps: expected shape .* = \(2, 1, 12, 12\), got \(2, 1, 12, 11\)",
    ),
    "maps dtype": (
        lambda p: dataclasses.replace(p, teacher=StoredMaps(torch.zeros(2, 1, 12, 12, dtype=torch.int64))),
        TypeError,
        "teacher.maps: expected dtype",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, error, message = REFUSED[name]
    problem = change(make_problem(Case(bias="both")))
    with pytest.raises(error, match=message):
        attention_map_loss(problem.student, problem.teacher, problem.layout)
    with pytest.raises(error, match=message):
        attention_map_distance(problem.student, problem.teacher, problem.layout)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "mean"}, ValueError, "reduction: expected one of 'frobenius', 'row', 'row_sq', got 'mean'"),
        ({"metric": "cosine"}, ValueError, "metric: expected one of"),
        ({"normalization": "row"}, ValueError, "normalization: expected one of"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"num_head_groups": 3}, ValueError, "num_head_groups: expected a divisor of the 4 heads of student.q"),
        ({"num_head_groups": 4}, ValueError, "num_head_groups: expected a divisor of the 2 heads of teacher.q"),
        ({"num_head_groups": 0}, ValueError, "num_head_groups: expected at least 1"),
        ({"num_head_groups": 1.0}, TypeError, "num_head_groups: expected an int"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes: expected at least 0"),
        ({"intra_weight": float("inf")}, ValueError, "intra_weight: expected a finite number"),
        ({"inter_weight": None}, TypeError, "inter_weight: expected a number"),
        ({"row_weights": torch.ones(5)}, ValueError, r"row_weights: expected shape \(22,\)"),
        ({"row_weights": torch.ones(22, dtype=torch.int64)}, TypeError, "row_weights: expected dtype"),
    ],
)
def test_options_refused(options, error, message):
    problem = make_problem(Case())
    with pytest.raises(error, match=message):
        attention_map_loss(problem.student, problem.teacher, problem.layout, **options)


@pytest.mark.parametrize("impl", sorted({"triton", "cpp"} - set(available_implementations())))
def test_an_implementation_that_is_not_here_is_named(impl):
    problem = make_problem(Case())
    with pytest.raises(ValueError, match=f"impl: '{impl}' is not available here; available are 'reference', 'torch'"):
        attention_map_loss(problem.student, problem.teacher, problem.layout, impl=impl)


def test_rows_refused():
    problem = make_problem(Case())
    for rows, error, message in (
        ([22], ValueError, r"rows: expected unit rows in \[0, 22\), got 22"),
        ([-1], ValueError, r"rows: expected unit rows in \[0, 22\), got -1"),
        ([1.5], TypeError, r"rows: expected integers, got \[1.5\]"),
        (torch.ones(22, dtype=torch.bool), TypeError, "rows: expected integers, got dtype torch.bool"),
        (torch.tensor(3), ValueError, r"rows: expected one dimension, got shape \(\)"),
        (3, TypeError, "rows: expected a list of ints or an integer tensor, got int"),
    ):
        with pytest.raises(error, match=message):
            attention_map_rows(problem.student, problem.layout, rows)
    with pytest.raises(ValueError, match=r"model.q: expected shape"):
        attention_map_rows(PackedAttention(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)), problem.layout, [0])


def test_from_padded_refused():
    q, mask = torch.zeros(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool"):
        PackedAttention.from_padded(q, q, mask.float())
    with pytest.raises(TypeError, match="mask: expected a tensor, got list"):
        PackedAttention.from_padded(q, q, mask.tolist())
    with pytest.raises(TypeError, match="q: expected a tensor, got list"):
        PackedAttention.from_padded(q.tolist(), q, mask)
    with pytest.raises(ValueError, match="k: expected shape"):
        PackedAttention.from_padded(q, q[:, :, :2], mask)


def test_bias_type_is_checked():
    problem = make_problem(Case())
    teacher = dataclasses.replace(problem.teacher, position_bias="deberta")
    with pytest.raises(TypeError, match=r"teacher\.position_bias: expected a DisentangledBias"):
        attention_map_loss(problem.student, teacher, problem.layout)
