"""The pinned configurations as the compilers see them, from the command that a user would run; no GPU is needed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from idrm_kernels import compile_report

# The kernels whose work is matrix products.
PRODUCTS = ("logsumexp", "difference", "head_mean", "query_gradient", "key_gradient")


def report(*arguments):
    command = [sys.executable, "-m", "idrm_kernels.compile_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    ("arch", "variants"),
    [
        ("sm_80", compile_report.UNSHARED_VARIANTS),
        ("sm_90", compile_report.UNSHARED_VARIANTS),
        ("sm_90", compile_report.SHARED_VARIANTS),
    ],
    ids=["sm_80", "sm_90", "sm_90-shared"],
)
def test_nothing_spills(arch, variants, tmp_path):
    """At head_dim 128: a smaller one needs fewer registers."""
    path = tmp_path / "report.json"
    flags = ("--head-dim", "128", "--json", str(path), "--variant", *variants)
    result = report("--arch", arch, "--dtype", "bf16", *flags)
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())
    assert {row["head_dim"] for row in rows} == {128}
    assert not [row for row in rows if row["spilled_bytes"]], result.stdout
    # What every GPU of the kind has: the smallest of those that take the tables of sm_80 is sm_86's.
    assert max(row["shared_bytes"] for row in rows) <= {"sm_80": 99, "sm_90": 227}[arch] * 1024
    for kernel in PRODUCTS:
        compiled = [row for row in rows if row["kernel"].startswith(kernel)]
        assert compiled, kernel
        name = {"sm_80": "mma", "sm_90": "wgmma"}[arch]
        assert all(row["matrix_instructions"].get(name, 0) > 0 for row in compiled), result.stdout


@pytest.mark.parametrize(("arch", "name"), [("sm_100", "tcgen05"), ("gfx942", "mfma")])
def test_other_architectures_compile(arch, name, tmp_path):
    path = tmp_path / "report.json"
    result = report(
        "--arch",
        arch,
        "--dtype",
        "bf16",
        "--head-dim",
        "64",
        "--variant",
        "packed",
        "bias",
        "causal",
        "--json",
        str(path),
    )
    assert result.returncode == 0, result.stderr
    rows = [row for row in json.loads(path.read_text()) if row["kernel"].startswith(PRODUCTS)]
    assert {row["kernel"].split("_kernel")[0] for row in rows} >= {"difference_fwd", "head_mean_fwd"}
    assert all(row["matrix_instructions"].get(name, 0) > 0 for row in rows), result.stdout


def test_full_float32_reports_its_spills():
    result = report("--arch", "sm_90", "--dtype", "fp32", "--head-dim", "64", "--variant", "packed")
    assert result.returncode == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split()[:8] == ["kernel", "arch", "dtype", "head_dim", "variant", "tile", "registers", "spilled"]
    assert any(row.startswith("query_gradient_bwd_kernel") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "--arch: invalid choice"),
        (["--head-dim", "512"], "--head-dim: expected 1 to 256, got 512"),
        (["--json", "missing/report.json"], "--json: expected a file in an existing folder"),
    ],
)
def test_refusals(arguments, message):
    result = report(*arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
