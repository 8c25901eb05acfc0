"""Every implementation against oracles: values and both gradients, in float64 and in the dtypes of training."""

import dataclasses

import pytest
import torch

from idrm_kernels import attention_map_distance, attention_map_loss
from idrm_kernels.reduction import example_losses
from idrm_kernels.testing.cases import Case, make_problem, pairwise_cases
from idrm_kernels.testing.comparison import check_errors, implementation_outputs, outputs
from idrm_kernels.testing.oracle import oracle_distance, oracle_loss
from tests.idrm_kernels.conftest import IMPLEMENTATIONS

RAGGED = ((7, 5), (1, 9), (0, 4), (0, 0))

# One combination a line; together every pair of options occurs.
CASES = {
    "plain": Case(lengths=RAGGED),
    "joint": Case(lengths=RAGGED, normalization="joint", weighted=True),
    "kl": Case(lengths=RAGGED, metric="kl", reduction="row_sq", num_head_groups=2),
    "kl-joint-merged": Case(lengths=RAGGED, metric="kl", normalization="joint", merged=True, reduction="row"),
    "kl-underflow": Case(lengths=RAGGED, metric="kl", reduction="row_sq", peak=400.0),
    "kl-frobenius-peaked": Case(lengths=RAGGED, metric="kl", weighted=True, merged=True, peak=8.0),
    "row": Case(lengths=RAGGED, reduction="row", weighted=True, inter_weight=0.3),
    "row_sq-joint-groups": Case(lengths=RAGGED, reduction="row_sq", normalization="joint", num_head_groups=2),
    "merged": Case(lengths=RAGGED, merged=True, intra_weight=0.7, inter_weight=1.3),
    "merged-joint-weights": Case(lengths=RAGGED, merged=True, normalization="joint", weighted=True, inter_weight=2.0),
    "bias": Case(lengths=RAGGED, bias="both", reduction="row_sq"),
    "c2p-merged": Case(lengths=RAGGED, bias="c2p", merged=True, num_head_groups=2),
    "p2c-joint": Case(lengths=RAGGED, bias="p2c", normalization="joint", reduction="row"),
    "bias-kl-joint-merged": Case(lengths=RAGGED, bias="both", metric="kl", normalization="joint", merged=True),
    "stored": Case(lengths=RAGGED, teacher="stored", num_head_groups=2),
    "stored-joint-kl": Case(lengths=RAGGED, teacher="stored", normalization="joint", metric="kl", merged=True),
    "stored-row": Case(lengths=RAGGED, teacher="stored", reduction="row", weighted=True, merged=True),
    "heads-apart": Case(lengths=RAGGED, num_heads=4, num_kv_heads=4, teacher_heads=4, num_head_groups=4),
    "groups-across-kv-heads": Case(
        lengths=RAGGED, num_heads=6, num_kv_heads=2, teacher_heads=3, num_head_groups=3, reduction="row_sq"
    ),
    "one-kv-head": Case(lengths=RAGGED, num_kv_heads=1, num_head_groups=2, merged=True),
    "one-segment": Case(lengths=((9,), (1,), (0,), (4,)), reduction="row"),
    "causal": Case(lengths=((9,), (1,), (0,)), causal=True),
    "causal-merged-kl": Case(lengths=((9,), (3,)), causal=True, merged=True, metric="kl", reduction="row_sq"),
    "causal-stored-joint": Case(lengths=((9,), (3,)), causal=True, teacher="stored", normalization="joint"),
    "three-segments": Case(lengths=((4, 3, 5), (0, 2, 1)), num_head_groups=2, weighted=True),
    "three-segments-joint": Case(lengths=((4, 3, 5), (0, 2, 1)), normalization="joint", merged=True, inter_weight=0.5),
    "intra-only-block": Case(lengths=RAGGED, inter_weight=0.0, merged=True),
    "intra-only": Case(lengths=RAGGED, inter_weight=0.0, normalization="joint"),
    "softmax-scale": Case(lengths=RAGGED, softmax_scale=0.9, merged=True),
    "shared": Case(lengths=RAGGED, shared=(4, 0, 0, 0)),
    "shared-joint-merged": Case(lengths=RAGGED, shared=(5, 1, 0, 0), normalization="joint", merged=True, weighted=True),
    "shared-kl-row": Case(lengths=RAGGED, shared=(2, 1, 0, 0), metric="kl", reduction="row", merged=True, bias="both"),
    "shared-groups": Case(
        lengths=((7, 5), (6, 6)), shared=(5, 6), num_head_groups=2, inter_weight=0.3, reduction="row_sq"
    ),
    "shared-three-segments": Case(lengths=((4, 3, 5), (2, 2, 3)), shared=(3, 2), weighted=True, intra_weight=0.7),
    "shared-three-segments-joint": Case(
        lengths=((4, 3, 5), (0, 2, 1)), shared=(2, 0), normalization="joint", metric="kl", teacher="stored"
    ),
    "shared-intra-only": Case(lengths=RAGGED, shared=(5, 1, 0, 0), inter_weight=0.0, merged=True),
    "shared-of-one-segment": Case(lengths=((9,), (4,)), shared=(3, 4)),
    "no-examples": Case(lengths=()),
    "empty-examples": Case(lengths=((0, 0), (0, 0))),
}


def oracle_outputs(problem, case):
    def distance(problem):
        return oracle_distance(problem.student, problem.teacher, problem.layout, **case.map_options)

    def loss(problem):
        return oracle_loss(distance(problem), problem.layout, row_weights=problem.row_weights, **case.loss_options)

    return outputs(problem, distance, loss)


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("name", CASES)
def test_float64_equals_the_oracle(name, exact_impl):
    case = dataclasses.replace(CASES[name], dtype=torch.float64)
    problem = make_problem(case)
    expected = oracle_outputs(problem, case)
    for output, value in implementation_outputs(problem, case, exact_impl).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[output], rtol=1e-9, atol=1e-10, msg=lambda m, o=output: f"{o}: {m}")


# Lengths around the tile of 64 rows; units of several tokens on both sides make the teacher's tiles ragged too.
LARGE = {
    "block": Case(lengths=((127, 64), (1, 193)), num_heads=4, num_kv_heads=2, head_dim=32, teacher_head_dim=16),
    "joint-kl": Case(
        lengths=((63, 100), (65, 7)),
        normalization="joint",
        metric="kl",
        reduction="row_sq",
        head_dim=32,
        num_head_groups=2,
    ),
    "merged-bias-row": Case(lengths=((63, 20), (33, 7)), merged=True, bias="both", reduction="row", weighted=True),
    "attention-sinks": Case(lengths=((127, 64),), peak=12.0, head_dim=32, teacher="stored"),
    "causal": Case(lengths=((130,), (64,)), causal=True, head_dim=16),
    "shared": Case(lengths=((127, 164), (66, 193)), shared=(100, 65), head_dim=32, teacher_head_dim=16),
    "shared-merged-joint": Case(
        lengths=((63, 40), (33, 70)),
        shared=(35, 0),
        merged=True,
        normalization="joint",
        bias="both",
        weighted=True,
        seed=1,
    ),
}


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (name, dtype)
            for name in LARGE
            for dtype in (torch.float32, torch.bfloat16)
            if name != "shared-merged-joint"
        ),
        # The same code as bfloat16's, and every option has it below.
        ("block", torch.float16),
        ("shared-merged-joint", torch.float32),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_plain_pytorch(name, dtype, impl, device):
    check_errors(dataclasses.replace(LARGE[name], dtype=dtype), impl, device)


def case_id(case):
    """The fields in which a case differs from the default."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return "-".join(str(value).replace(" ", "") for name, value in fields.items() if value != getattr(Case(), name))


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize(
    ("impl", "case"),
    [
        pytest.param(impl, case, id=f"{impl}-{case_id(case)}")
        for impl in IMPLEMENTATIONS
        # The interpreter takes ten seconds a case: there every third one, and all that share a prefix.
        for index, case in enumerate(pairwise_cases())
        if impl != "triton" or torch.cuda.is_available() or index % 3 == 0 or case.shared
    ],
)
def test_every_pair_of_options(impl, case, device):
    check_errors(case, impl, device)


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize(
    "name",
    [
        *("kl-underflow", "heads-apart", "groups-across-kv-heads", "one-kv-head"),
        *("intra-only", "no-examples", "empty-examples"),
    ],
)
def test_corner_cases_in_float32(name, impl, device):
    check_errors(dataclasses.replace(CASES[name], dtype=torch.float32), impl, device)


@pytest.mark.parametrize("name", ["plain", "kl-joint-merged", "stored"])
def test_intra_and_inter_are_the_unweighted_parts(name, impl, widest_dtype, device):
    case = dataclasses.replace(CASES[name], dtype=widest_dtype, intra_weight=0.25, inter_weight=3.0)
    problem, q, _ = make_problem(case, device).leaves()
    result = attention_map_loss(
        problem.student, problem.teacher, problem.layout, impl=impl, **case.map_options, **case.loss_options
    )
    torch.testing.assert_close(result.loss, 0.25 * result.intra + 3 * result.inter)
    assert result.loss.requires_grad
    assert not result.intra.requires_grad
    assert not result.inter.requires_grad
    assert torch.autograd.grad(result.loss, q)[0].abs().max() > 0


@pytest.mark.parametrize("normalization", ["block", "joint"])
@pytest.mark.parametrize("reduction", ["frobenius", "row", "row_sq"])
def test_rows_of_weight_zero(reduction, normalization, impl, widest_dtype, device):
    """Some rows of a block, and all rows of another: they count nothing and get no gradient."""
    case = Case(lengths=((7, 5), (4, 3)), reduction=reduction, normalization=normalization, dtype=widest_dtype)
    problem = make_problem(case, device)
    weights = torch.ones(problem.layout.total_units, device=device)
    weights[[1, 4]] = 0
    weights[7:12] = 0
    problem = dataclasses.replace(problem, row_weights=weights)
    expected = oracle_outputs(problem, case)
    actual = implementation_outputs(problem, case, impl)
    tolerance = 1e-10 if widest_dtype == torch.float64 else 2e-6
    for output in ("loss", "loss_dq", "loss_dk"):
        torch.testing.assert_close(actual[output], expected[output], rtol=10 * tolerance, atol=tolerance)
    assert actual["loss_dq"][weights == 0].abs().max() == 0


@pytest.mark.parametrize(
    "name", ["joint", "row", "kl", "three-segments", "stored-row", "no-examples", "empty-examples"]
)
def test_example_losses_are_the_terms_of_the_loss(name, impl, widest_dtype, device):
    case = dataclasses.replace(CASES[name], dtype=widest_dtype)
    problem = make_problem(case, device)
    sides = (problem.student, problem.teacher, problem.layout)
    options = {"row_weights": problem.row_weights}
    loss = attention_map_loss(*sides, impl=impl, **options, **case.map_options, **case.loss_options)
    distances = attention_map_distance(*sides, impl=impl, **case.map_options)
    intra, inter = example_losses(distances, problem.layout, reduction=case.reduction, **options)
    assert intra.shape == inter.shape == (problem.layout.num_examples,)
    torch.testing.assert_close(intra.sum() / max(len(intra), 1), loss.intra)
    torch.testing.assert_close(inter.sum() / max(len(inter), 1), loss.inter)


def test_inputs_may_be_strided(impl, device):
    """Slices of one fused projection: the same bits as contiguous copies, and gradients of the inputs' shape."""
    problem = make_problem(Case(lengths=((5, 3),), merged=True), device)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(problem.layout.total_tokens, 8, 8, generator=generator).to(device).requires_grad_()
    results = []
    for q, k in ((fused[:, :4], fused[:, 4:6]), (fused[:, :4].contiguous(), fused[:, 4:6].contiguous())):
        student = dataclasses.replace(problem.student, q=q, k=k)
        loss = attention_map_loss(student, problem.teacher, problem.layout, impl=impl).loss
        distance = attention_map_distance(student, problem.teacher, problem.layout, impl=impl)
        results.append((loss, distance, *torch.autograd.grad(loss + distance.sum(), fused)))
    assert all(torch.equal(own, expected) for own, expected in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", ["q", "k"])
def test_one_input_alone_may_require_grad(wanted, impl, device):
    problem, q, k = make_problem(Case(lengths=((5, 3),)), device).leaves()

    def gradients(student, *leaves):
        loss = attention_map_loss(student, problem.teacher, problem.layout, impl=impl).loss
        distance = attention_map_distance(student, problem.teacher, problem.layout, impl=impl).sum()
        return torch.autograd.grad(loss + distance, leaves)

    both = dict(zip("qk", gradients(problem.student, q, k), strict=True))
    other = {"q": {"k": k.detach()}, "k": {"q": q.detach()}}[wanted]
    (alone,) = gradients(dataclasses.replace(problem.student, **other), {"q": q, "k": k}[wanted])
    assert torch.equal(alone, both[wanted])


def test_bias_tables_may_be_float32(impl, device):
    """The same values in either dtype give the same bits."""
    problem = make_problem(Case(dtype=torch.bfloat16, bias="both", merged=True), device)
    bias = problem.teacher.position_bias
    wide = dataclasses.replace(bias, c2p=bias.c2p.float(), p2c=bias.p2c.float())
    wide = dataclasses.replace(problem.teacher, position_bias=wide)
    narrow, own = (
        attention_map_distance(problem.student, teacher, problem.layout, impl=impl)
        for teacher in (problem.teacher, wide)
    )
    assert torch.equal(own, narrow)


def test_scalars_are_float32_for_every_training_dtype(impl, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = make_problem(Case(dtype=dtype), device)
        result = attention_map_loss(problem.student, problem.teacher, problem.layout, impl=impl)
        assert {value.dtype for value in result} == {torch.float32}
        assert all(value.shape == () for value in result)


def test_student_and_teacher_may_differ_in_dtype(impl, device):
    """The same values in either dtype give the same loss, but for products that are summed in another order."""
    problem = make_problem(Case(dtype=torch.bfloat16, teacher_head_dim=16, seed=50), device)
    teacher = dataclasses.replace(problem.teacher, q=problem.teacher.q.float(), k=problem.teacher.k.float())
    same = attention_map_loss(problem.student, problem.teacher, problem.layout, impl=impl).loss
    other = attention_map_loss(problem.student, teacher, problem.layout, impl=impl).loss
    torch.testing.assert_close(other, same, rtol=1e-6, atol=0)


def test_equal_maps_have_distance_and_gradient_zero(impl, widest_dtype, device):
    problem, q, k = make_problem(Case(dtype=widest_dtype), device).leaves()
    teacher = problem.student.detach()
    for reduction in ("frobenius", "row", "row_sq"):
        loss = attention_map_loss(problem.student, teacher, problem.layout, reduction=reduction, impl=impl).loss
        assert loss == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, (q, k)))


def test_a_unit_longer_than_a_tile(impl, widest_dtype, device):
    """150 student and 200 teacher tokens in one unit: rows and columns of a unit cross tiles."""
    from idrm_kernels import MapLayout, PackedAttention

    generator = torch.Generator().manual_seed(0)
    units = torch.tensor([0, 1, *[2] * 150, 3, 3])
    teacher_units = torch.tensor([0, *[1] * 200, 2, 3])
    layout = MapLayout.build(
        [0, 2, len(units)],
        teacher_cu_seqlens=[0, 201, len(teacher_units)],
        cu_units=[0, 2, 4],
        unit_of_token=units,
        teacher_unit_of_token=teacher_units,
        device=device,
    )

    def normal(tokens):
        return torch.randn(tokens, 2, 8, generator=generator, dtype=torch.float64).to(device, widest_dtype)

    q, k = (normal(len(units)).requires_grad_() for _ in "qk")
    tq, tk = (normal(len(teacher_units)) for _ in "qk")
    student, teacher = PackedAttention(q, k), PackedAttention(tq, tk)
    expected = oracle_loss(oracle_distance(student, teacher, layout), layout)
    loss = attention_map_loss(student, teacher, layout, impl=impl).loss
    torch.testing.assert_close(loss, expected)
    for own, oracle in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(expected, (q, k)), strict=True):
        tolerance = 1e-12 if widest_dtype == torch.float64 else 1e-7
        torch.testing.assert_close(own, oracle, rtol=1e3 * tolerance, atol=tolerance)


def test_teacher_receives_no_gradient(impl, widest_dtype, device):
    problem = make_problem(Case(dtype=widest_dtype, bias="both"), device)
    student, q, _ = problem.leaves()
    bias = problem.teacher.position_bias
    bias = dataclasses.replace(bias, c2p=bias.c2p.requires_grad_(), p2c=bias.p2c.requires_grad_())
    teacher = dataclasses.replace(
        problem.teacher, q=problem.teacher.q.requires_grad_(), k=problem.teacher.k.requires_grad_(), position_bias=bias
    )
    attention_map_loss(student.student, teacher, problem.layout, impl=impl).loss.backward()
    assert q.grad is not None
    assert [t.grad for t in (teacher.q, teacher.k, bias.c2p, bias.p2c)] == [None] * 4


def test_float16_gradients_survive_a_loss_scale(impl, device):
    """Unscaled, these gradients are far below float16's smallest number; scaled as a loss scaler does, they fit."""
    case = Case(dtype=torch.float16, lengths=((127, 64),) * 2, head_dim=32)
    problem, q, k = make_problem(case, device).leaves()
    scale = 2.0**16
    loss = attention_map_loss(
        problem.student, problem.teacher, problem.layout, reduction="row_sq", intra_weight=1e-4, impl=impl
    ).loss
    scaled = torch.autograd.grad(loss * scale, (q, k))
    exact, q64, k64 = make_problem(case, device).to(torch.float64).leaves()
    loss = attention_map_loss(
        exact.student, exact.teacher, exact.layout, reduction="row_sq", intra_weight=1e-4, impl="reference"
    ).loss
    for own, reference in zip(scaled, torch.autograd.grad(loss * scale, (q64, k64)), strict=True):
        assert (own.double() - reference).abs().max() <= 4 * torch.finfo(torch.float16).eps * reference.abs().max()
