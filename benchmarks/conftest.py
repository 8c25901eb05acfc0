"""How ``pytest benchmarks`` runs: contests measured once, rows kept for the report, the tables printed at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import machine
from benchmarks.contest import Contest
from benchmarks.measurement import Measurement, RecordedClock, measure
from benchmarks.report import Row, tables


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the contests that do not fit into ten minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left to --full")
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # the tables with ratios take its place
        config.option.benchmark_autosave = not config.option.benchmark_save
    config.stash[ROWS] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No time limit for the test that measures a whole contest; some contests wait for --full."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    for item in items:
        item.add_marker(pytest.mark.timeout(0))


ROWS = pytest.StashKey[list[Row]]()
MEASUREMENTS = pytest.StashKey[dict[Contest, dict[str, Measurement]]]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(contest, variant): measures the contest, the first time, and hands one variant's rounds over."""

    def run(contest: Contest, variant: str) -> None:
        measured = request.session.stash.setdefault(MEASUREMENTS, {})
        if contest not in measured:
            parameters = (item.callspec.params for item in request.session.items)
            names = [values["variant"] for values in parameters if values["contest"] == contest]
            measured[contest] = measure(contest, tuple(names))
        measurement = measured[contest][variant]
        request.config.stash[ROWS].append(Row.of(contest, variant, measurement))
        if measurement.failure is not None:
            pytest.fail(measurement.failure)
        if not measurement.seconds:
            pytest.skip(f"needs {measurement.needed_bytes / 2**30:.0f} GiB")
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
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(tables(rows))
