"""How ``pytest benchmarks`` runs: contests measured once, rows kept for the report, the tables printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.contest import Contest
from benchmarks.measurement import Measurement, RecordedClock, measure
from benchmarks.report import Row, describe_machine, tables

ROWS = pytest.StashKey[list[Row]]()
MEASUREMENTS = pytest.StashKey[dict[Contest, dict[str, Measurement]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the contests that do not fit into ten minutes")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks run in one process: others beside it would be measured as well")
    config.addinivalue_line("markers", "full: left to --full")
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # the tables with ratios take its place
        config.option.benchmark_autosave = not config.option.benchmark_save
    config.stash[ROWS] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves some contests to --full; no time limit for the tests here, of which one measures a whole contest."""
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    left_out = [] if config.getoption("--full") else [item for item in ours if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in ours:
        item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def compete(request: pytest.FixtureRequest) -> Callable[[Contest, str], None]:
    """compete(contest, variant): measures the contest's selected variants, the first time, and records this one.

    Fails where the variant's results are wrong; skips, with the memory it would need, where there is not as much.
    """

    def run(contest: Contest, variant: str) -> None:
        measured = request.session.stash.setdefault(MEASUREMENTS, {})
        if contest not in measured:
            parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = [values["variant"] for values in parameters if values.get("contest") == contest]
            measured[contest] = measure(contest, tuple(names))
        measurement = measured[contest][variant]
        request.config.stash[ROWS].append(Row.of(contest, variant, measurement))
        if measurement.failure is not None:
            pytest.fail(measurement.failure)
        if not measurement.seconds:
            pytest.skip(f"needs {measurement.needed_bytes / 2**30:.1f} GiB or more")
        clock = RecordedClock(measurement.seconds)
        request.node.add_marker(pytest.mark.benchmark(timer=clock, group=contest.name))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update(peak_bytes=measurement.peak_bytes)
        benchmark.pedantic(lambda: None, rounds=len(measurement.seconds))

    return run


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["idrm"] = machine.describe()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["rows"] = [row.as_dict() for row in config.stash[ROWS]]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        described = machine.describe()
        devices = dict.fromkeys(row.workload["device"] for row in rows)
        terminalreporter.section("benchmarks")
        for device in devices:
            terminalreporter.write_line(describe_machine(described, device))
        terminalreporter.write_line("\n" + tables(rows))
