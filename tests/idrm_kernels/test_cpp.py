"""The CPU kernel: threads, memory, instruction sets, what it refuses, and life without the binary."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from idrm_kernels import (
    MapLayout,
    PackedAttention,
    attention_map_distance,
    attention_map_loss,
    available_implementations,
)
from idrm_kernels.testing.cases import Case, error_bound, make_problem
from idrm_kernels.testing.comparison import implementation_outputs
from idrm_kernels.testing.memory import peak_bytes, release_kept_memory

REPOSITORY = Path(__file__).parents[2]
built = pytest.mark.skipif("cpp" not in available_implementations(), reason="the CPU kernel was not built")

# Together: several strands a block, gradients that wait for a block's loss, units longer than a chunk, shared keys.
RAGGED = {
    "strands": Case(lengths=((600, 40), (0, 9), (70, 300)), num_heads=4, num_kv_heads=2, head_dim=16),
    "joint": Case(lengths=((300, 1, 290),), normalization="joint", metric="kl", merged=True, weighted=True),
    "groups": Case(
        lengths=((130, 60), (20, 300)),
        num_heads=6,
        num_kv_heads=2,
        teacher_heads=3,
        num_head_groups=3,
        reduction="row",
        merged=True,
        bias="both",
    ),
    "causal": Case(lengths=((301,), (0,), (64,)), causal=True, reduction="row_sq", dtype=torch.bfloat16, head_dim=40),
    "stored": Case(lengths=((129, 257),) * 3, teacher="stored", dtype=torch.bfloat16, inter_weight=0.0),
    "float64": Case(lengths=((129, 300), (3, 1)), dtype=torch.float64),
    "shared": Case(lengths=((600, 640), (7, 9), (70, 300)), shared=(400, 0, 64), head_dim=16, num_kv_heads=1),
    "shared-joint": Case(
        lengths=((300, 160, 290),), shared=(150,), normalization="joint", metric="kl", merged=True, weighted=True
    ),
    "shared-groups": Case(
        lengths=((200, 260), (190, 220)), shared=(180, 60), num_heads=6, teacher_heads=3, num_head_groups=3, bias="both"
    ),
}
# Whose numerators, or maps of all heads, a thread's memory has no room for and that of many has.
LARGE_SHARED = {
    "numerators": Case(lengths=((500, 520),), shared=(300,), num_heads=16, num_kv_heads=16, head_dim=16),
    "one-sweep": Case(lengths=((500, 520),), shared=(300,), num_heads=16, num_kv_heads=16, reduction="row"),
    "maps": Case(lengths=((1500, 1400),), shared=(1200,), num_heads=1, num_kv_heads=1, teacher_heads=1),
}


def test_it_was_built_where_it_can_be():
    """Or else all tests of it would be skipped."""
    wanted = shutil.which("g++") and os.environ.get("IDRM_KERNELS_BUILD") != "skip"
    assert not wanted or "cpp" in available_implementations()


def gradients(case, **options):
    """The loss, the distances and both gradients of each."""
    problem, q, k = make_problem(case).leaves()
    sides = (problem.student, problem.teacher, problem.layout)
    loss = attention_map_loss(
        *sides, impl="cpp", row_weights=problem.row_weights, **case.map_options, **case.loss_options, **options
    ).loss
    distance = attention_map_distance(*sides, impl="cpp", **case.map_options, **options)
    outputs = (loss, distance, *torch.autograd.grad(loss, (q, k)), *torch.autograd.grad(distance.sum(), (q, k)))
    return [output.detach() for output in outputs]


@pytest.fixture
def threads():
    """Sets torch's threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("name", RAGGED)
def test_threads_and_workspace_change_no_bit(name, threads):
    threads(1)
    first = gradients(RAGGED[name])
    for count, workspace_bytes in ((2, 64 << 20), (3, 0), (1, 0)):
        threads(count)
        again = gradients(RAGGED[name], workspace_bytes=workspace_bytes)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (count, workspace_bytes)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE_SHARED)
def test_what_is_kept_of_a_shared_prefix_changes_no_bit(name, dtype, threads):
    case = dataclasses.replace(LARGE_SHARED[name], dtype=dtype, teacher="stored")
    threads(1)
    first = gradients(case, workspace_bytes=0)
    threads(16)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(case), strict=True))


@built
def test_examples_with_and_without_a_shared_prefix_change_no_bit_of_another():
    case = Case(lengths=((40, 60), (170, 200), (9, 150), (30, 30)), shared=(0, 160, 5, 0), head_dim=16)
    problem, q, k = make_problem(case).leaves()
    layout, teacher = problem.layout, problem.teacher
    together = attention_map_distance(problem.student, teacher, layout, impl="cpp")
    of_all = torch.autograd.grad(together.sum(), (q, k))
    row = first = 0
    for lengths, shared in zip(case.lengths, case.shared, strict=True):
        units, rows = slice(first, first + sum(lengths)), slice(row, row + sum(lengths) - shared)
        q, k = (side.detach()[rows].requires_grad_() for side in (problem.student.q, problem.student.k))
        alone = attention_map_distance(
            PackedAttention(q, k),
            PackedAttention(teacher.q[units], teacher.k[units]),
            MapLayout.build([0, lengths[0], sum(lengths)], shared_prefix_lens=[shared]),
            impl="cpp",
        )
        assert torch.equal(alone, together[:, units])
        for own, every in zip(torch.autograd.grad(alone.sum(), (q, k)), of_all, strict=True):
            assert torch.equal(own, every[rows])
        first, row = units.stop, rows.stop


@built
@pytest.mark.parametrize("metric", ["l2", "kl"])
@pytest.mark.parametrize("normalization", ["block", "joint"])
def test_a_shared_prefix_beside_far_larger_scores(normalization, metric):
    """Its probabilities in one segment have all their digits where another segment's rest has all the attention."""
    case = Case(lengths=((40, 50),), shared=(30,), head_dim=16, metric=metric, normalization=normalization)
    problem = make_problem(case)
    k = problem.student.k.clone()
    k[30:40] *= 40  # the rest of segment 0
    problem = dataclasses.replace(problem, student=dataclasses.replace(problem.student, k=k))
    exact = implementation_outputs(problem.to(torch.float64), case, "reference")
    plain = implementation_outputs(problem, case, "reference")
    for output, value in implementation_outputs(problem, case, "cpp").items():
        bound = error_bound(plain[output], exact[output], torch.finfo(torch.float32).eps)
        assert (value.double() - exact[output]).abs().max() <= bound, output


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(512, 512), (2048, 64)], ids=str)
def test_a_shared_prefix_takes_no_more_memory_than_a_repeated_one(lengths, dtype, threads):
    threads(2)
    case = Case(lengths=(lengths,), shared=(min(lengths) // 2,), num_heads=8, num_kv_heads=8, head_dim=64, dtype=dtype)

    def peak(problem):
        problem, *_ = problem.leaves()
        sides = (problem.student, problem.teacher, problem.layout)
        return peak_bytes(lambda: attention_map_loss(*sides, impl="cpp").loss.backward())

    problem = make_problem(case)
    assert peak(problem) <= peak(problem.repeated())


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalization", ["block", "joint"])
def test_memory_is_linear_in_tokens(normalization, dtype, threads):
    """64 MiB and 4 times q, k and their gradients, where the maps of all heads would take 2 GB."""
    threads(2)
    lengths, heads, head_dim = (2048, 2048), 32, 16
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(sum(lengths), heads, head_dim, generator=generator).to(dtype) for _ in "qk")
    student = PackedAttention(q.requires_grad_(), k.requires_grad_())
    teacher = PackedAttention(q.detach()[:, :2], k.detach()[:, :2])
    layout = MapLayout.build([0, lengths[0], sum(lengths)])

    def call():
        attention_map_loss(student, teacher, layout, normalization=normalization, impl="cpp").loss.backward()

    assert peak_bytes(call) <= (64 << 20) + 4 * 2 * (q.nbytes + k.nbytes)


@built
def test_many_threads_share_the_memory_of_a_few(threads):
    """Blocks in several waves, the examples' keys among what the threads leave room for."""
    threads(16)
    tokens, heads, groups = 256, 16, 8
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4 * tokens, heads, 64, generator=generator).bfloat16() for _ in "qk")
    student = PackedAttention(q.requires_grad_(), k.requires_grad_())
    teacher = PackedAttention(*(side.detach()[:, :groups, :16].contiguous() for side in (q, k)))
    layout = MapLayout.build([tokens * segment for segment in range(5)])
    options = {"normalization": "joint", "num_head_groups": groups, "workspace_bytes": 0, "impl": "cpp"}

    def call():
        attention_map_loss(student, teacher, layout, **options).loss.backward()

    assert peak_bytes(call) <= 8 * (q.nbytes + k.nbytes)


@built
def test_buffers_are_kept_for_the_next_call_until_they_are_released(threads):
    threads(2)
    problem, q, k = make_problem(Case(lengths=((256, 256),), num_heads=8, num_kv_heads=8, head_dim=64)).leaves()

    def allocated():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            loss = attention_map_loss(problem.student, problem.teacher, problem.layout, impl="cpp").loss
            torch.autograd.grad(loss, (q, k))
        events = measured.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)

    release_kept_memory()
    first, second = allocated(), allocated()
    assert second < 4 * (q.nbytes + k.nbytes) < first / 2  # the gradients, and their multiples by the incoming one
    release_kept_memory()
    assert allocated() == first


@built
def test_calls_at_the_same_time_share_no_buffer(threads):
    threads(1)
    cases = [Case(lengths=((90, 70),), head_dim=32, seed=seed) for seed in range(4)]
    alone = [gradients(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for together, expected in zip(pool.map(gradients, cases), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


@built
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_keeps_the_error_rule(capability):
    """In a process of its own, for the choice is made once; a CPU without the set says so."""
    program = """
import dataclasses, torch
from idrm_kernels.impl import cpp
from idrm_kernels.testing.cases import Case
from idrm_kernels.testing.comparison import check_errors
try:
    print(cpp.capability())
except RuntimeError as error:
    assert "this CPU has no" in str(error), error
    print("none")
    raise SystemExit
case = Case(lengths=((127, 64), (1, 193)), head_dim=40, teacher_head_dim=24, bias="both", merged=True)
for dtype in (torch.float32, torch.bfloat16):
    for options in (
        {},
        {"normalization": "joint", "metric": "kl", "reduction": "row_sq"},
        {"peak": 12.0},
        {"shared": (60, 1), "peak": 12.0},
    ):
        check_errors(dataclasses.replace(case, dtype=dtype, **options), "cpp", torch.device("cpu"))
"""
    assert run_python(program, IDRM_KERNELS_CPU_CAPABILITY=capability).stdout.split()[-1] in (capability, "none")


@built
def test_an_unknown_instruction_set_is_refused():
    program = "from idrm_kernels.impl import cpp; cpp.capability()"
    result = run_python(program, check=False, IDRM_KERNELS_CPU_CAPABILITY="mmx")
    assert result.returncode
    assert "IDRM_KERNELS_CPU_CAPABILITY: expected portable, avx2, avx512 or avx512_bf16, got mmx" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set alone is compiled here")
@pytest.mark.parametrize("capability", ["avx2", "avx512", "avx512_bf16"])
def test_instruction_sets_share_no_function(capability, tmp_path):
    """The linker keeps one copy of what several sources define; a CPU might lack what that copy was compiled for."""
    binary = str(tmp_path / "object.o")
    # Unoptimised: nothing is inlined but what always is.
    compile_it = ["g++", "-std=c++17", "-O0", "-c", f"csrc/{capability}.cpp", "-o", binary]
    subprocess.run(compile_it, cwd=REPOSITORY, check=True)
    listed = subprocess.run(["nm", "-C", binary], capture_output=True, text=True, check=True).stdout.splitlines()
    shared = [name for _, kind, name in (line.split(maxsplit=2) for line in listed if line[0] != " ") if kind in "WVu"]
    assert shared
    assert [name for name in shared if f"idrm::{capability}::" not in name] == []


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_takes_it_on_a_cpu(dtype):
    problem = make_problem(Case(dtype=dtype))
    sides = (problem.student, problem.teacher, problem.layout)
    assert torch.equal(attention_map_distance(*sides), attention_map_distance(*sides, impl="cpp"))


@built
@pytest.mark.parametrize("magnitude", [2.0**-22, 2.0**-14, 1.0, 2.0**13], ids=str)
def test_float16_is_widened_without_error(magnitude):
    """The bits of its float32 copy: subnormal numbers, those around the smallest normal one, and large ones."""
    problem = make_problem(Case(dtype=torch.float16, head_dim=33, teacher_head_dim=7, softmax_scale=1 / magnitude))
    narrow = dataclasses.replace(problem.student, q=(problem.student.q.float() * magnitude).half())
    assert narrow.q.isfinite().all()
    losses = []
    for student in (narrow, dataclasses.replace(narrow, q=narrow.q.float(), k=narrow.k.float())):
        teacher = dataclasses.replace(student, softmax_scale=0.5 / magnitude)
        for sides in ((student, problem.teacher), (student, teacher)):
            losses.append(attention_map_distance(*sides, problem.layout, impl="cpp"))
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])


@built
@pytest.mark.parametrize("slot", [-1, 5])
def test_slots_beyond_the_tables_are_refused_in_compiled_code(slot):
    """Where Python has not looked at them."""
    problem = make_problem(Case(bias="both"))
    bias = problem.teacher.position_bias
    slots = bias.slot_of_delta.clone()
    slots[1] = slot
    teacher = dataclasses.replace(problem.teacher, position_bias=dataclasses.replace(bias, slot_of_delta=slots))
    compiled = torch.compile(attention_map_distance, backend="eager")
    with pytest.raises(RuntimeError, match=rf"slot_of_delta: expected slots in \[0, 5\), got {slot}"):
        compiled(problem.student, teacher, problem.layout, impl="cpp")


@built
def test_another_device_is_refused():
    problem = make_problem(Case())
    layout = problem.layout.to("meta")
    student, teacher = (
        dataclasses.replace(side, q=side.q.to("meta"), k=side.k.to("meta"))
        for side in (problem.student, problem.teacher)
    )
    with pytest.raises(ValueError, match="impl: 'cpp' cannot run here: expected tensors on the CPU, got them on meta"):
        attention_map_loss(student, teacher, layout, impl="cpp")


def test_without_the_binary_auto_falls_back_and_says_so_once():
    program = """
import sys, warnings
sys.modules["idrm_kernels._C"] = None
import torch
from idrm_kernels import attention_map_loss, available_implementations
from idrm_kernels.testing.cases import Case, make_problem
assert "cpp" not in available_implementations()
problem = make_problem(Case())
sides = (problem.student, problem.teacher, problem.layout)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [attention_map_loss(*sides).loss for _ in range(2)]
    expected = attention_map_loss(*sides, impl="torch").loss
assert all(torch.equal(loss, expected) for loss in losses)
(warning,) = caught
assert warning.filename == "<string>", warning.filename
print(warning.message)
try:
    attention_map_loss(*sides, impl="cpp")
except ValueError as error:
    print(error)
"""
    warning, error = run_python(program).stdout.splitlines()
    assert "IDRM_KERNELS_BUILD=force pip install --no-build-isolation -e ." in warning
    assert error.startswith("impl: 'cpp' is not available here; available are 'reference', 'torch'")


def build(tmp_path, **environment):
    """Runs setup.py's build of the extension into an empty folder."""
    arguments = ["build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return result, list(tmp_path.rglob("*.so"))


NO_COMPILER = {"CC": "/nonexistent/c++", "CXX": "/nonexistent/c++"}


def test_a_failing_compiler_is_one_line_in_auto(tmp_path):
    result, binaries = build(tmp_path, IDRM_KERNELS_BUILD="auto", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert not binaries
    assert result.stderr.count("idrm_kernels._C is left out, impl='torch' takes its place: ") == 1


def test_a_failing_compiler_is_an_error_in_force(tmp_path):
    result, binaries = build(tmp_path, IDRM_KERNELS_BUILD="force", **NO_COMPILER)
    assert result.returncode
    assert not binaries
    assert "IDRM_KERNELS_BUILD=force: idrm_kernels._C could not be built: " in result.stderr


def test_skip_builds_nothing(tmp_path):
    result, binaries = build(tmp_path, IDRM_KERNELS_BUILD="skip")
    assert result.returncode == 0, result.stderr
    assert not binaries


def test_an_unknown_switch_is_refused(tmp_path):
    result, _ = build(tmp_path, IDRM_KERNELS_BUILD="maybe")
    assert result.returncode
    assert "IDRM_KERNELS_BUILD: expected auto, force or skip, got 'maybe'" in result.stderr


def run_python(program, check=True, **environment):
    """A program in a process of its own, from the repository's root."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr
    return result
