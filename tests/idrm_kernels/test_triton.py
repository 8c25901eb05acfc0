"""What only the Triton kernels have: tile shapes, tf32, 64-bit offsets, slabs, the search; when they are chosen."""

import dataclasses
import functools

import pytest
import torch

from idrm_kernels import MapLayout, PackedAttention, StoredMaps, api, attention_map_distance, attention_map_loss
from idrm_kernels.impl.problem import LossOptions, MapProblem
from idrm_kernels.testing.cases import Case, make_problem
from idrm_kernels.testing.comparison import check_errors, implementation_outputs
from idrm_kernels.testing.memory import peak_bytes
from idrm_kernels.tiles import Section

tl = pytest.importorskip("triton.language")
from idrm_kernels.impl.triton import configurations, launch, sweep  # noqa: E402
from idrm_kernels.impl.triton.batch import Batch  # noqa: E402
from idrm_kernels.impl.triton.configurations import Configuration  # noqa: E402
from idrm_kernels.impl.triton.plan import Plan  # noqa: E402
from idrm_kernels.impl.triton.sweep import loss_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.fixture
def impl():
    return "triton"


def flat_problem(student, teacher, layout):
    return MapProblem(*api._flat(student, teacher, layout, "l2", "block", 1, 64 << 20))


# (rows, columns) of the kernels whose tiles have both, of the query gradient, and of the key gradient.
TILES = {
    "64x64": ((64, 64), (64, 16), (16, 64)),
    "64x128": ((64, 128), (128, 32), (32, 128)),
    "128x64": ((128, 64), (64, 128), (64, 64)),
    "128x128": ((128, 128), (128, 128), (64, 128)),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_every_tile_shape(tiles, merged, device, monkeypatch):
    pairs, queries, keys = TILES[tiles]

    def shape(kernel, head_dim, arithmetic, arch):
        rows, columns = {"query_gradient": queries, "key_gradient": keys}.get(kernel, pairs)
        return Configuration(64 if kernel == "head_mean" else rows, columns, 4, 1)

    monkeypatch.setattr(configurations, "pinned", shape)
    # About twice as many tokens as units where these are merged.
    lengths = ((40, 9),) if merged else ((129, 20),)
    check_errors(Case(lengths=lengths, merged=merged, head_dim=32, dtype=torch.bfloat16), "triton", device)


@pytest.mark.parametrize("peak", [1.0, 12.0])
def test_float32_in_tf32(peak, device, monkeypatch):
    """Where the user allows float32 products on ten bits, errors may be of that size."""
    monkeypatch.setattr(launch.Side, "precision", "tf32")
    case = Case(lengths=((70, 30),), head_dim=32, num_head_groups=2, peak=peak)
    check_errors(case, "triton", device, eps=2.0**-10)


OFFSET_CASES = {
    "fused": Case(lengths=((70, 3), (9, 0)), head_dim=16, normalization="joint", dtype=torch.float16),
    "merged-bias": Case(lengths=((9, 3), (5, 0)), head_dim=16, merged=True, bias="both"),
    "stored-causal": Case(lengths=((70,), (3,)), causal=True, teacher="stored", num_head_groups=2),
}


@pytest.mark.parametrize("name", OFFSET_CASES)
def test_64_bit_offsets_change_no_bit(name, device, monkeypatch):
    case = OFFSET_CASES[name]
    problem = make_problem(case, device)
    narrow = implementation_outputs(problem, case, "triton")
    monkeypatch.setattr(launch, "index_type", lambda problem, elements: tl.int64)
    for output, value in implementation_outputs(problem, case, "triton").items():
        assert torch.equal(value, narrow[output]), output


def test_offsets_are_of_64_bits_where_storage_asks_for_it():
    class Problem:
        segments, maps, teacher_q, teacher_k, c2p, p2c = 2, None, None, None, None, None
        q = k = torch.empty(2**20, 32, 8, device="meta")

    assert launch.index_type(Problem, 0) == tl.int32
    assert launch.index_type(Problem, 2**31) == tl.int64
    for name, shape in {
        "q": (2**20, 32, 64),
        "maps": (8, 1, 2**14, 2**14),
        "c2p": (2**18, 16, 512),
        "teacher_q": (2**26, 16, 1),
    }.items():
        own = type("Own", (Problem,), {name: torch.empty(shape, device="meta")})
        assert launch.index_type(own, 0) == tl.int64, name


@pytest.mark.parametrize(
    ("tokens", "workspace_bytes", "expected"),
    [(30000, 64 << 20, tl.int32), (30000, 128 << 20, tl.int64), (8, 4 << 30, tl.int32)],
)
def test_slabs_of_distances_are_counted_for_offsets(tokens, workspace_bytes, expected):
    """Held as partial sums, 16 elements take one byte: more of them than the workspace has bytes."""
    q = torch.empty(2 * tokens, 1, 16, dtype=torch.bfloat16)
    sides = PackedAttention(q, q), PackedAttention(q, q)
    flat = api._flat(*sides, MapLayout.build([0, tokens, 2 * tokens]), "l2", "block", 1, workspace_bytes)
    batch = Batch(MapProblem(*flat), arch="sm_90", run=lambda kernel, grid, **arguments: None)
    assert batch.index == expected


@pytest.mark.parametrize("workspace_bytes", [0, 16 << 20])
@pytest.mark.parametrize("merged", [False, True])
def test_memory_of_distances_is_as_documented(merged, workspace_bytes, monkeypatch):
    """Forward and backward of row distances, a head a group: beyond what is linear, the workspace or its least."""
    tokens, heads, head_dim = 4096, 32, 16
    q = torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16)
    units = [token - token // 9 for token in range(tokens)] if merged else None
    layout = MapLayout.build([0, tokens // 2, tokens], unit_of_token=units)
    sides = PackedAttention(q, q), PackedAttention(q, q)
    problem = MapProblem(*api._flat(*sides, layout, "l2", "block", heads, workspace_bytes))
    batch = functools.partial(Batch, arch="sm_90", run=lambda kernel, grid, **arguments: None)
    monkeypatch.setattr(sweep, "Batch", batch)
    distances = heads * layout.total_units * 2 * 4
    coefficients = torch.empty(heads, layout.total_units, 2)
    denominators = 4 * 2 * tokens * heads
    smallest = 64 * tokens * 3 + (2 * 4 * 16 * tokens if merged else 0)
    workspace = max(workspace_bytes, smallest) + (1 << 20)
    assert peak_bytes(lambda: sweep.distance(problem)) <= 2 * denominators + distances + workspace
    linear = 3 * denominators + 2 * q.nbytes + 2 * q.nbytes + (3 * heads * tokens * 2 * 4 if merged else 0)
    assert peak_bytes(lambda: sweep.distance_backward(coefficients, problem)) <= linear + workspace


@pytest.mark.parametrize("new_interface", [False, True])
def test_both_of_torchs_interfaces_choose_tf32(new_interface):
    q = torch.zeros(2, 1, 8)
    flat = api._flat(PackedAttention(q, q), PackedAttention(q, q), MapLayout.build([0, 1, 2]), "l2", "block", 1, 0)
    side = launch.Side.student(MapProblem(*flat))
    assert side.precision == "ieee"
    try:
        if new_interface:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert side.precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_sections_of_a_plan_are_aligned():
    layout = MapLayout.build(
        [0, 3, 3, 70], segments=3, unit_of_token=[i // 2 for i in range(2)] + [1] + [2 + i // 3 for i in range(67)]
    )
    plan = Plan.of(
        MapProblem(
            *api._flat(
                *(PackedAttention(torch.empty(70, 1, 8), torch.empty(70, 1, 8)),) * 2, layout, "l2", "block", 1, 0
            )
        )
    )
    assert all(bounds.start % 2 == 0 for bounds in plan.bounds)
    assert len(plan.values(Section.UNITS)) == 70
    assert len(plan.values(Section.SLOTS)) == layout.total_units + 1


SHARED = Case(lengths=((70, 67), (2, 1)), shared=(66, 0), num_heads=1, num_kv_heads=1, head_dim=16, teacher_heads=1)


@pytest.mark.parametrize(
    ("case", "slabs"),
    [
        (SHARED, [2, 2, 1, 1]),
        (dataclasses.replace(SHARED, lengths=((5, 4), (2, 1)), shared=(3, 0), merged=True), [2, 1, 1]),
    ],
    ids=["tokens", "merged"],
)
def test_slabs_that_cut_a_shared_example_change_no_bit(case, slabs, device):
    """Without a workspace a slab has at most 64 tokens: of the prefix, or of what is left of one segment."""
    problem = make_problem(case, device)
    plan = Plan.of(flat_problem(problem.student, problem.teacher, problem.layout))
    cut = [slab for slab in plan.slabs(1, 2, 0) if slab.is_shared]
    assert [(len(slab.segments), slab.is_whole) for slab in cut] == [(segments, False) for segments in slabs]

    def outputs(workspace_bytes):
        own, q, k = problem.leaves()
        sides = (own.student, own.teacher, own.layout)
        loss = attention_map_loss(*sides, impl="triton", workspace_bytes=workspace_bytes).loss
        return loss, *torch.autograd.grad(loss, (q, k))

    for own, expected in zip(outputs(0), outputs(64 << 20), strict=True):
        assert torch.equal(own, expected)


def test_examples_with_and_without_a_shared_prefix_change_no_bit_of_each_other(device):
    problem = make_problem(dataclasses.replace(SHARED, lengths=((7, 3), (4, 5)), shared=(0, 3)), device)
    student, teacher = problem.student, problem.teacher

    def outputs(tokens, units, layout):
        q, k = (tensor[tokens].detach().requires_grad_() for tensor in (student.q, student.k))
        own_teacher = PackedAttention(teacher.q[units], teacher.k[units])
        distances = attention_map_distance(PackedAttention(q, k), own_teacher, layout, impl="triton")
        return distances.squeeze(0), *torch.autograd.grad(distances.sum(), (q, k))

    both = outputs(slice(None), slice(None), problem.layout)
    for place, layout in (
        (slice(0, 10), MapLayout.build([0, 7, 10], device=device)),
        (slice(10, None), MapLayout.build([0, 4, 9], shared_prefix_lens=[3], device=device)),
    ):
        for own, expected in zip(outputs(place, place, layout), both, strict=True):
            assert torch.equal(own, expected[place])


def test_a_shared_prefix_is_scored_once(monkeypatch):
    """A prefix of two tiles and rests of one and three: 6 tiles of rows and of keys, where two segments have 8."""
    monkeypatch.setattr(configurations, "pinned", lambda *key: Configuration(64, 64, 4, 1))
    programs = {}
    for shared in (128, 0):
        layout = MapLayout.build([0, 192, 512], shared_prefix_lens=[shared])
        q, teacher_q = (torch.empty(tokens, 1, 64) for tokens in (layout.total_tokens, layout.teacher_total_tokens))
        problem = flat_problem(PackedAttention(q, q), PackedAttention(teacher_q, teacher_q), layout)

        def record(kernel, grid, shared=shared, **arguments):
            programs[kernel.fn.__name__, shared] = grid[0]

        loss_of(Batch(problem, arch="sm_90", run=record), LossOptions(None, "frobenius", 1.0, 1.0, True))
    for kernel, power in (("query_gradient", 1), ("key_gradient", 1), ("difference", 2)):
        name = f"{kernel}_fwd_kernel" if kernel == "difference" else f"{kernel}_bwd_kernel"
        assert (programs[name, 128], programs[name, 0]) == (6**power, 8**power)


@pytest.mark.parametrize("kernel", ["logsumexp", "difference", "head_mean", "query_gradient", "key_gradient"])
def test_every_candidate_of_a_search_can_be_launched(kernel, monkeypatch):
    """The plan has the tiles of each, in ragged segments."""
    q = torch.empty(130, 2, 64, dtype=torch.bfloat16)
    layout = MapLayout.build(
        [0, 100, 130], unit_of_token=[i // 2 for i in range(130)] if kernel == "head_mean" else None
    )
    flat = api._flat(PackedAttention(q, q), PackedAttention(q, q), layout, "l2", "block", 1, 64 << 20)
    pinned = configurations.pinned
    launched = []
    for own in configurations.candidates(kernel, 64, "bf16", "sm_90"):
        monkeypatch.setattr(
            configurations, "pinned", lambda name, *key, own=own: own if name == kernel else pinned(name, *key)
        )
        batch = Batch(
            MapProblem(*flat), arch="sm_90", run=lambda function, grid, **arguments: launched.append(function)
        )
        loss_of(batch, LossOptions(None, "frobenius", 1.0, 1.0, True))
    assert launched


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 128, "triton"),
        ("cuda", torch.float32, 256, "triton"),
        ("cuda", torch.float64, 64, "torch"),
        ("cuda", torch.float16, 320, "torch"),
    ],
)
def test_auto_takes_triton_for_tensors_on_a_gpu(device, dtype, head_dim, expected):
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(4, 2, head_dim, dtype=dtype, device=device)
        maps = torch.empty(1, 1, 4, 4, device=device)
    assert api._chosen("auto", PackedAttention(q, q), PackedAttention(q, q)) == expected
    assert api._chosen("auto", PackedAttention(q, q), StoredMaps(maps)) == expected


def test_triton_refuses_what_it_cannot_take():
    layout = MapLayout.build([0, 2, 4])
    for size, dtype, message in ((8, torch.float64, "float64"), (320, torch.float32, "head_dim of at most 256")):
        q = torch.zeros(4, 2, size, dtype=dtype)
        with pytest.raises(ValueError, match=f"impl: 'triton' cannot run here: expected .*{message}"):
            attention_map_loss(PackedAttention(q, q), PackedAttention(q, q), layout, impl="triton")


def test_a_search_takes_the_fastest_that_runs(monkeypatch):
    times = {Configuration(64, 64, 4, 1): 3.0, Configuration(64, 128, 8, 2): 1.0}

    def timed(run, **options):
        run()
        return times[ran[-1]]

    ran = []

    def run(own):
        if own not in times:
            raise RuntimeError("out of shared memory")
        ran.append(own)

    monkeypatch.setattr("triton.testing.do_bench", timed)
    tried = configurations.candidates("head_mean", 64, "bf16", "sm_90")
    assert tried[0] == configurations.pinned("head_mean", 64, "bf16", "sm_90")
    assert len(set(tried)) == len(tried)
    assert configurations.fastest(tried, run) == Configuration(64, 128, 8, 2)


@pytest.mark.parametrize("workspace_bytes", [0, 64 << 20])
@pytest.mark.parametrize("merged", [False, True])
def test_memory_is_as_documented(merged, workspace_bytes):
    """What the launches of a loss with gradients allocate at 2 x 4096 tokens, by the formula of docs/kernels.md."""
    tokens, heads, num_kv_heads, head_dim, teacher_heads = 8192, 32, 8, 128, 16
    q, k = (torch.empty(tokens, count, head_dim, dtype=torch.bfloat16) for count in (heads, num_kv_heads))
    tq, tk = (torch.empty(tokens, teacher_heads, 64, dtype=torch.bfloat16) for _ in range(2))
    units = [token - token // 9 for token in range(tokens)] if merged else None
    layout = MapLayout.build([0, tokens // 2, tokens], unit_of_token=units)
    student, teacher = PackedAttention(q, k), PackedAttention(tq, tk)
    problem = MapProblem(*api._flat(student, teacher, layout, "l2", "block", 1, workspace_bytes))
    batch_options = {"arch": "sm_90", "run": lambda kernel, grid, **arguments: None}

    def step():
        loss_of(Batch(problem, **batch_options), LossOptions(None, "frobenius", 1.0, 1.0, True))

    denominators_and_deltas = 4 * 2 * tokens * (2 * heads + teacher_heads)
    distances = 8 * layout.total_units * 2 + (4 * tokens * 2 if merged else 0)
    dk_between_slabs = 4 * num_kv_heads * head_dim * tokens
    smallest = 64 * tokens * 3 + (2 * 4 * 16 * tokens if merged else 0)
    linear = q.nbytes + k.nbytes + denominators_and_deltas + distances + dk_between_slabs
    measured = peak_bytes(step)
    naive = 30 * tokens**2 * heads
    assert measured <= linear + max(workspace_bytes, smallest) + (1 << 20)
    assert measured - q.nbytes - k.nbytes < naive / 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_a_cuda_graph_replays_the_loss():
    case = Case(lengths=((127, 64), (30, 65)), head_dim=64, merged=True, bias="both", dtype=torch.bfloat16)
    problem, q, k = make_problem(case, torch.device("cuda")).leaves()

    def step():
        loss = attention_map_loss(problem.student, problem.teacher, problem.layout, impl="triton").loss
        return loss, *torch.autograd.grad(loss, (q, k))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for own, eager in zip(captured, expected, strict=True):
        assert torch.equal(own, eager)
