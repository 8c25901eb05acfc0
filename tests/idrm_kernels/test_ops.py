"""The registered ops: gradcheck, opcheck, torch.compile, autocast, checkpointing, and what repeats bit for bit."""

import dataclasses

import pytest
import torch

from idrm_kernels import DisentangledBias, MapLayout, PackedAttention, attention_map_distance, attention_map_loss
from idrm_kernels.api import _arguments
from idrm_kernels.impl.problem import MapProblem
from idrm_kernels.ops import OPS
from idrm_kernels.testing.cases import Case, make_problem
from idrm_kernels.testing.memory import peak_bytes

SMALL = Case(lengths=((3, 2), (0, 4)), dtype=torch.float64, num_heads=2, num_kv_heads=1, head_dim=3)
GRADCHECK_CASES = {
    "frobenius": SMALL,
    "joint-kl-row_sq": dataclasses.replace(SMALL, normalization="joint", metric="kl", reduction="row_sq"),
    "joint-merged": dataclasses.replace(SMALL, normalization="joint", merged=True, weighted=True),
    "shared": dataclasses.replace(SMALL, lengths=((3, 2), (1, 4)), shared=(2, 1), merged=True),
    "row-groups": dataclasses.replace(SMALL, reduction="row", num_head_groups=2, merged=True, inter_weight=0.4),
}


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_gradcheck(name, exact_impl):
    case = GRADCHECK_CASES[name]
    problem, q, k = make_problem(case).leaves()

    def loss(q, k):
        student = dataclasses.replace(problem.student, q=q, k=k)
        return attention_map_loss(
            student,
            problem.teacher,
            problem.layout,
            row_weights=problem.row_weights,
            impl=exact_impl,
            **case.map_options,
            **case.loss_options,
        ).loss

    def distance(q, k):
        student = dataclasses.replace(problem.student, q=q, k=k)
        return attention_map_distance(student, problem.teacher, problem.layout, impl=exact_impl, **case.map_options)

    assert torch.autograd.gradcheck(loss, (q, k))
    assert torch.autograd.gradcheck(distance, (q, k))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=((3, 2),), bias="both", merged=True, num_heads=2, num_kv_heads=1),
        Case(lengths=((3, 0),), teacher="stored", dtype=torch.bfloat16, num_heads=2, num_head_groups=2),
        Case(lengths=((4, 2),), shared=(2,), num_heads=2, num_kv_heads=1),
        Case(lengths=(), normalization="joint"),
        Case(lengths=((5,), (3,)), causal=True, dtype=torch.float16, reduction="row", num_heads=2),
    ],
    ids=["bias", "stored", "shared", "empty", "causal"],
)
def test_opcheck(case, requires_grad, impl, device):
    problem = make_problem(case, device)
    if requires_grad:
        problem, _, _ = problem.leaves()
    arguments = _arguments(
        problem.student, problem.teacher, problem.layout, *case.map_options.values(), workspace_bytes=1 << 20
    )
    torch.library.opcheck(OPS[impl].distance, arguments)
    options = (problem.row_weights, case.reduction, case.intra_weight, case.inter_weight, requires_grad)
    torch.library.opcheck(OPS[impl].loss, (*arguments, *options))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
def test_opcheck_of_transposed_inputs(requires_grad, impl, device):
    """As a (heads, tokens, head_dim) projection gives them: dense, but in another order than the gradients'."""
    problem = make_problem(Case(lengths=((3, 2),), num_heads=2, num_kv_heads=2), device)
    q, k = (
        tensor.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
        for tensor in (problem.student.q, problem.student.k)
    )
    student = dataclasses.replace(problem.student, q=q, k=k)
    arguments = _arguments(student, problem.teacher, problem.layout, "l2", "block", 1, workspace_bytes=1 << 20)
    torch.library.opcheck(OPS[impl].distance, arguments)
    torch.library.opcheck(OPS[impl].loss, (*arguments, None, "frobenius", 1.0, 1.0, requires_grad))


def training_step(problem, q, k, **options):
    student = dataclasses.replace(problem.student, q=q * 1.0, k=k * 1.0)
    loss = attention_map_loss(student, problem.teacher, problem.layout, **options).loss
    return loss + attention_map_distance(student, problem.teacher, problem.layout, impl=options["impl"]).sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic, impl, device):
    torch.compiler.reset()
    compiled = torch.compile(training_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths, shared in ((((7, 5),), (3,)), *([(((4, 1), (3, 2)), (1, 1))] if dynamic else [])):
        case = Case(lengths=lengths, shared=shared, merged=True, bias="both", num_heads=2, num_kv_heads=1)
        problem, q, k = make_problem(case, device).leaves()
        eager = training_step(problem, q, k, impl=impl)
        eager_gradients = torch.autograd.grad(eager, (q, k))
        value = compiled(problem, q, k, impl=impl)
        assert torch.equal(value, eager)
        for own, expected in zip(torch.autograd.grad(value, (q, k)), eager_gradients, strict=True):
            assert torch.equal(own, expected)


def test_compiles_with_inductor():
    torch.compiler.reset()
    problem, q, k = make_problem(Case(merged=True)).leaves()
    value = torch.compile(training_step, fullgraph=True, dynamic=True)(problem, q, k, impl="torch")
    torch.testing.assert_close(value, training_step(problem, q, k, impl="torch"))


@pytest.mark.parametrize("function", ["loss", "distance"])
def test_differentiating_twice_raises(function, impl, widest_dtype, device):
    """Also where another term gives the gradient a graph, so that leaving this one out would go unnoticed."""
    problem, q, _ = make_problem(Case(dtype=widest_dtype), device).leaves()
    if function == "loss":
        value = attention_map_loss(problem.student, problem.teacher, problem.layout, impl=impl).loss
    else:
        value = attention_map_distance(problem.student, problem.teacher, problem.layout, impl=impl).sum()
    (gradient,) = torch.autograd.grad(value + q.pow(3).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(gradient.square().sum(), q)


def test_autocast_casts_nothing(impl, device):
    def run():
        problem, q, k = make_problem(Case(lengths=((20, 10),), head_dim=32), device).leaves()
        value = training_step(problem, q, k, impl=impl)
        return value, *torch.autograd.grad(value, (q, k))

    plain = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = run()
    for own, expected in zip(under_autocast, plain, strict=True):
        assert torch.equal(own, expected)


def test_activation_checkpointing_changes_nothing(impl, device):
    problem, q, k = make_problem(Case(lengths=((5, 3),)), device).leaves()
    plain = torch.autograd.grad(training_step(problem, q, k, impl=impl), (q, k))
    value = torch.utils.checkpoint.checkpoint(training_step, problem, q, k, impl=impl, use_reentrant=False)
    for own, expected in zip(torch.autograd.grad(value, (q, k)), plain, strict=True):
        assert torch.equal(own, expected)


def test_no_gradient_work_without_need(impl, device):
    """Without grad the op is asked for none, and returns none."""
    problem, _, _ = make_problem(Case(), device).leaves()
    with torch.no_grad():
        assert not attention_map_loss(problem.student, problem.teacher, problem.layout, impl=impl).loss.requires_grad
    case = Case()
    arguments = _arguments(problem.student, problem.teacher, problem.layout, *case.map_options.values(), 0)
    *_, dq, dk = OPS[impl].loss(*arguments, None, "frobenius", 1.0, 1.0, False)
    assert dq.numel() == dk.numel() == 0


def test_a_teacher_may_run_in_inference_mode(impl, device):
    """Its tensors, and a layout and weights made beside it, are ones that autograd refuses to save."""
    case = Case(lengths=((5, 3),), bias="both", merged=True, weighted=True)
    expected = make_problem(case, device)
    with torch.inference_mode():
        made = make_problem(case, device)

    def gradients(teacher, layout, row_weights):
        problem, q, k = expected.leaves()
        value = attention_map_loss(problem.student, teacher, layout, row_weights=row_weights, impl=impl).loss
        value = value + attention_map_distance(problem.student, teacher, layout, impl=impl).sum()
        return torch.autograd.grad(value, (q, k))

    plain = gradients(expected.teacher, expected.layout, expected.row_weights)
    for own, same in zip(gradients(made.teacher, made.layout, made.row_weights), plain, strict=True):
        assert torch.equal(own, same)


BITWISE_CASES = [
    Case(lengths=((50, 7), (0, 3)), num_heads=2, num_kv_heads=1, head_dim=16, merged=True),
    Case(lengths=((65, 9), (0, 3)), num_heads=2, head_dim=16, normalization="joint", metric="kl", num_head_groups=2),
    Case(lengths=((65, 7),), num_heads=2, head_dim=16, dtype=torch.bfloat16, bias="both", reduction="row"),
    Case(lengths=((50, 70),), shared=(40,), num_heads=2, num_kv_heads=1, head_dim=16),
]


def values_and_gradients(problem, case, **options):
    problem, q, k = problem.leaves()
    loss = attention_map_loss(
        problem.student, problem.teacher, problem.layout, **case.map_options, **case.loss_options, **options
    ).loss
    distance = attention_map_distance(problem.student, problem.teacher, problem.layout, **case.map_options, **options)
    gradients = torch.autograd.grad(loss, (q, k)) + torch.autograd.grad(distance.sum(), (q, k))
    return loss.detach(), distance.detach(), *gradients


@pytest.mark.parametrize("case", BITWISE_CASES, ids=["merged", "joint", "bias", "shared"])
def test_repeats_bit_for_bit_whatever_the_workspace(case, impl, device):
    problem = make_problem(case, device)
    first = values_and_gradients(problem, case, impl=impl)
    for workspace_bytes in (64 << 20, *([100_000] if case.merged else []), 0):
        again = values_and_gradients(problem, case, impl=impl, workspace_bytes=workspace_bytes)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), workspace_bytes


def test_a_prefix_of_three_segments_repeats_bit_for_bit_on_several_threads(exact_impl):
    """Large enough for torch to share sums out among threads."""
    case = Case(lengths=((300, 301, 302),), shared=(299,), num_heads=2, num_kv_heads=2, head_dim=64, reduction="row_sq")
    problem = make_problem(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (values_and_gradients(problem, case, impl=exact_impl) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", BITWISE_CASES, ids=["merged", "joint", "bias", "shared"])
def test_other_examples_change_no_bit(case, impl, device):
    """The example alone, and as the second of a batch at an odd offset: equal distances; equal gradients of them."""
    more = {"lengths": ((13, 2), *case.lengths), "shared": (2, *case.shared) if case.shared else ()}
    whole = make_problem(dataclasses.replace(case, **more), device)
    layout = whole.layout
    first, last = layout.cu_units[2], layout.cu_units[4]
    arguments = _arguments(whole.student, whole.teacher, layout, *case.map_options.values(), workspace_bytes=0)
    rows = MapProblem(*arguments).example_rows[1]
    tokens = slice(rows.start, rows.stop)
    teacher_tokens = slice(int(layout.teacher_unit_offsets[first]), int(layout.teacher_unit_offsets[last]))
    cu_units = layout.cu_units[2:5] - first
    sides = []
    for offsets in (layout.unit_offsets, layout.teacher_unit_offsets):
        own = offsets[first : last + 1] - offsets[first]
        sides.append((own[cu_units], torch.repeat_interleave(own.diff())))
    (cu_seqlens, units), (teacher_cu_seqlens, teacher_units) = sides
    alone = MapLayout.build(
        cu_seqlens,
        teacher_cu_seqlens=teacher_cu_seqlens,
        cu_units=cu_units,
        unit_of_token=units,
        teacher_unit_of_token=teacher_units,
        shared_prefix_lens=case.shared or None,
        device=device,
    )
    bias = whole.teacher.position_bias
    if bias is not None:
        tables = {name: getattr(bias, name)[teacher_tokens] for name in ("positions", "c2p", "p2c")}
        bias = dataclasses.replace(bias, **tables)
    teacher = dataclasses.replace(
        whole.teacher, q=whole.teacher.q[teacher_tokens], k=whole.teacher.k[teacher_tokens], position_bias=bias
    )

    def run(student, teacher, layout):
        q, k = (t.detach().clone().requires_grad_() for t in (student.q, student.k))
        distance = attention_map_distance(PackedAttention(q, k), teacher, layout, impl=impl, **case.map_options)
        return distance.detach(), *torch.autograd.grad(distance.sum(), (q, k))

    distance, dq, dk = run(whole.student, whole.teacher, layout)
    own = run(PackedAttention(whole.student.q[tokens], whole.student.k[tokens]), teacher, alone)
    assert torch.equal(own[0], distance[:, first:last])
    assert torch.equal(own[1], dq[tokens])
    assert torch.equal(own[2], dk[tokens])


def differentiated(function, q, k, teacher, layout, **options):
    """A call that computes the loss or the distances and their gradients."""
    student = PackedAttention(q.clone().requires_grad_(), k.clone().requires_grad_())
    if function == "loss":
        return lambda: attention_map_loss(student, teacher, layout, **options).loss.backward()
    return lambda: attention_map_distance(student, teacher, layout, **options).sum().backward()


@pytest.mark.parametrize("workspace_bytes", [0, 64 << 20])
@pytest.mark.parametrize("function", ["loss", "distance"])
def test_torch_holds_no_map(function, workspace_bytes):
    """Peak memory of forward and backward beyond what is linear in tokens stays below the workspace and a tile.

    A map a head would be 134 MB here and one averaged map 8 MB, where the tile is 3 MB; dense maps must fail the check.
    """
    tokens, heads, head_dim = 1448, 16, 16
    generator = torch.Generator().manual_seed(0)
    q, k, tq, tk = (torch.randn(tokens, heads, head_dim, generator=generator) for _ in range(4))
    layout = MapLayout.build([0, tokens // 2, tokens])

    def peak(impl):
        options = {"impl": impl, "workspace_bytes": workspace_bytes}
        return peak_bytes(differentiated(function, q, k, PackedAttention(tq, tk), layout, **options))

    linear = 12 * q.nbytes
    tile = 64 * (tokens // 2) * heads * 4
    # Without a workspace to keep the probabilities in, only blocks of heads of a tile are live.
    allowed = linear + (tile if workspace_bytes else 0) + (4 << 20)
    assert peak("torch") <= allowed < 8 * tokens * tokens * 4
    assert peak("reference") > allowed


@pytest.mark.parametrize("function", ["loss", "distance"])
def test_torch_keeps_the_probabilities_of_one_tile(function):
    tokens, heads = 1024, 16
    generator = torch.Generator().manual_seed(0)
    q, k, tq, tk = (torch.randn(tokens, heads, 4, generator=generator) for _ in range(4))
    layout = MapLayout.build([0, tokens], segments=1)
    kept, recomputed = (
        peak_bytes(differentiated(function, q, k, PackedAttention(tq, tk), layout, impl="torch", workspace_bytes=size))
        for size in (64 << 20, 0)
    )
    assert recomputed < kept <= recomputed + 64 * tokens * heads * 4


@pytest.mark.parametrize("function", ["loss", "distance"])
@pytest.mark.parametrize("long_side", ["student", "teacher"])
def test_torch_holds_no_map_of_a_long_unit(long_side, function):
    """One unit of n tokens against n units of one: not even their averaged n x n map is held."""
    n = 1024
    whole = [0, n, 2 * n], [0] * n + list(range(1, n + 1))
    short = [0, 1, n + 1], list(range(n + 1))
    (cu_seqlens, units), (teacher_cu_seqlens, teacher_units) = (
        (whole, short) if long_side == "student" else (short, whole)
    )
    layout = MapLayout.build(
        cu_seqlens,
        teacher_cu_seqlens=teacher_cu_seqlens,
        cu_units=[0, 1, n + 1],
        unit_of_token=units,
        teacher_unit_of_token=teacher_units,
    )
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(layout.total_tokens, 1, 8, generator=generator) for _ in range(2))
    tq, tk = (torch.randn(layout.teacher_total_tokens, 1, 8, generator=generator) for _ in range(2))
    call = differentiated(function, q, k, PackedAttention(tq, tk), layout, impl="torch", workspace_bytes=0)
    assert peak_bytes(call) < n * n * 4


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_copies_no_bias_table(table_dtype):
    """The tables, 256 slots a token and head, outgrow a tile: they are looked up as they are."""
    tokens, heads, slots = 256, 12, 256
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, heads, 8, generator=generator).bfloat16() for _ in range(2))
    c2p, p2c = (torch.randn(tokens, heads, slots, generator=generator).to(table_dtype) for _ in range(2))
    positions = torch.arange(tokens, dtype=torch.int32)
    bias = DisentangledBias(positions, torch.arange(255, dtype=torch.int32), c2p, p2c)
    layout = MapLayout.build([0, tokens], segments=1)
    call = differentiated(
        "loss", q, k, PackedAttention(q, k, position_bias=bias), layout, impl="torch", workspace_bytes=0
    )
    assert peak_bytes(call) < tokens * heads * slots * 4
