"""``pytest benchmarks`` and the report as a user runs them, in processes of their own."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )


def test_a_run_prints_ratios_and_the_report_shows_them(tmp_path):
    storage, selected = f"--benchmark-storage=file://{tmp_path}", "cpu-float32-32x128-2x256 and not compiled"
    measured = run("pytest", "benchmarks", "-p", "no:cacheprovider", storage, "-k", selected)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    assert "4 passed" in measured.stdout
    (path,) = tmp_path.glob("*/*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["naive", "torch", "cpp", "sdpa"]
    assert all(min(row["seconds"]) > 0 and row["peak_bytes"] > 0 for row in rows)

    reported = run("benchmarks.report", str(path), "--output", str(tmp_path / "results"))
    assert reported.returncode == 0, reported.stderr
    (report,) = tmp_path.glob("results/*/report.md")
    (line,) = [line for line in report.read_text().splitlines() if line.startswith("| cpu-") and "±" in line]
    assert line in measured.stdout
    naive, cpp = (next(row["seconds"] for row in rows if row["variant"] == name) for name in ("naive", "cpp"))
    assert f"| {statistics.median(naive) / statistics.median(cpp):.2f} |" in line


def test_measuring_in_several_processes_is_refused():
    refused = run("pytest", "benchmarks", "-n", "2", "-k", "cpu-float32-16x64-2x256")
    assert refused.returncode != 0
    assert "benchmarks run in one process" in refused.stdout + refused.stderr


@pytest.mark.parametrize("arguments", [(), ("--full",)])
def test_what_is_left_to_full(arguments):
    listed = run("pytest", "benchmarks", "--collect-only", "-q", *arguments)
    assert listed.returncode == 0, listed.stdout
    assert "cpu-bfloat16-32x128-2x2048-cpp" in listed.stdout
    assert ("cpu-bfloat16-16x64-2x16384-cpp" in listed.stdout) == bool(arguments)
