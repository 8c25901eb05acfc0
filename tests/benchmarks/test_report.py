"""Tables and plots of rows, and the command that writes them."""

import dataclasses
import json

import pytest

from benchmarks import report
from benchmarks.measurement import Measurement
from benchmarks.report import Row, exponent, main, tables

MACHINE = {"cpu": "Some CPU, 2 threads", "cpu_instructions": "avx2", "python": "3.11.7", "torch": "2.13.0"}


def of(contest, name, measurement):
    return dataclasses.replace(Row.of(contest, name, measurement), date="2026-11-24", commit="a1")


@pytest.fixture
def rows(fake_contest):
    measured = {
        "naive": Measurement([0.4, 0.5, 0.6], peak_bytes=300 << 20),
        "torch": Measurement([0.2], peak_bytes=40 << 20),
        "cpp": Measurement([0.1, 0.1, 0.1], peak_bytes=30 << 20),
        "sdpa": Measurement([0.05], peak_bytes=10 << 20),
    }
    rows = [of(fake_contest(), name, measurement) for name, measurement in measured.items()]
    rows += [
        of(fake_contest(length=2000), "naive", Measurement(needed_bytes=64 << 30)),
        of(fake_contest(length=2000), "torch", Measurement(failure="torch is wrong")),
        of(fake_contest(length=2000), "cpp", Measurement([1.5], peak_bytes=123 << 20)),
    ]
    return rows


@pytest.fixture
def steps(fake_contest):
    seconds = {"bradley-terry": [1.0, 2.0], "capture": [1.01, 2.02], "teacher": [1.2, 2.2], "fused": [1.3, 2.3]}
    peaks = {"bradley-terry": 100, "capture": 100, "teacher": 110, "fused": 115}
    measured = {
        name: Measurement(seconds[name], peak_bytes=peaks[name] << 20, before_bytes=900 << 20) for name in seconds
    }
    measured["naive"] = Measurement(needed_bytes=5000 << 20)
    rows = [of(fake_contest(suite="training_step"), name, measurement) for name, measurement in measured.items()]
    return [dataclasses.replace(row, workload={**row.workload, "layers": 4, "all_layers": 8}) for row in rows]


def saved(path, rows, **machine):
    content = {"rows": [row.as_dict() for row in rows], "machine_info": {"idrm": {**MACHINE, **machine}}}
    path.write_text(json.dumps(content))
    return path


def test_a_table_has_medians_ratios_and_memory(rows):
    text = tables(rows)
    assert "| fake-2x64 | 500 ±20% | 200 | 100 ±0% | 50.0 | 5.00 | 2.00 | 2.00 | 0.00 |" in text
    assert "| fake-2x64 | 300 | 40.0 | 30.0 | 10.0 |" in text


def test_what_did_not_run_and_what_is_wrong_are_named(rows):
    text = tables(rows)
    assert "| fake-2x2000 | does not fit | wrong | 1500 |  |" in text
    assert "| fake-2x2000 | needs 65536 or more | wrong | 123 |  |" in text
    assert "- fake-2x2000, torch: torch is wrong" in text


def test_a_steps_additions_are_paired_by_rounds_and_scaled_to_all_layers(steps):
    """Medians of the rounds' differences; shares of a step twice as long, and of the whole peak."""
    text = tables(steps)
    assert "| fake-2x64 | 1500 ±50% | +15.0 (+0.5%) | +185.0 (+6.2%) | +100.0 (+3.3%) | does not fit | +300.0" in text
    assert (
        "| fake-2x64 | 100 | +0.0 (+0.0%) | +10.0 (+1.0%) | +5.0 (+0.5%) | needs 5000 or more | +15.0 (+1.5%) |" in text
    )


def test_a_teachers_times_are_compared_with_eagers(fake_contest):
    measured = {
        "sdpa": Measurement([0.2, 0.2, 0.2], peak_bytes=30 << 20),
        "eager": Measurement([0.5, 0.5, 0.5], peak_bytes=300 << 20),
        "sdpa-half": Measurement(failure="the half is wrong"),
    }
    text = tables([of(fake_contest(suite="teacher"), name, measurement) for name, measurement in measured.items()])
    assert "| contest | eager | sdpa | sdpa-half | eager / sdpa | eager / sdpa-half |" in text
    assert "| fake-2x64 | 500 ±0% | 200 ±0% | wrong | 2.50 |  |" in text
    assert "| fake-2x64 | 300 | 30.0 | wrong |" in text


def test_a_step_s_times_are_compared_with_trls(fake_contest):
    measured = {
        "shared": Measurement([0.2, 0.2, 0.2], peak_bytes=30 << 20),
        "trl": Measurement([0.5, 0.5, 0.5], peak_bytes=300 << 20),
        "shared-live": Measurement([0.4, 0.4, 0.4], peak_bytes=60 << 20),
    }
    contest = fake_contest(suite="preference_step")
    text = tables([of(contest, name, measurement) for name, measurement in measured.items()])
    assert "| contest | trl | shared | shared-live | trl / shared | trl / shared-live |" in text
    assert "| fake-2x64 | 500 ±0% | 200 ±0% | 400 ±0% | 2.50 | 1.25 |" in text
    assert "| fake-2x64 | 300 | 30.0 | 60.0 |" in text


def test_exponents_are_those_of_the_largest_sizes(fake_contest):
    assert exponent([(n, 3e-9 * n**2) for n in (512, 1024, 2048, 4096)]) == pytest.approx(2)
    assert exponent([(64, 100.0), (512, 1.0), (1024, 2.0), (2048, 4.0)]) == pytest.approx(1)
    assert exponent([(512, 1.0)]) is None
    assert exponent([(512, 0.0), (1024, 1.0)]) is None
    rows = [
        of(fake_contest(length=length), "cpp", Measurement([1e-9 * length**2], peak_bytes=1000 * length))
        for length in (256, 512, 1024)
    ]
    assert "| float32, 2x8 | 2.00, 1.00 |" in tables(rows)
    assert "Exponents" not in tables(rows[:2])


def test_the_command_writes_tables_rows_and_plots(tmp_path, rows, capsys):
    results = tmp_path / "results"
    assert main([str(saved(tmp_path / "run.json", rows)), "--output", str(results)]) == 0
    folder = results / "some-cpu-2-threads"
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"report.md", "rows.json", "memory.png", "time.png"}
    described = "Some CPU, 2 threads; python 3.11.7, torch 2.13.0, cpu_instructions avx2"
    assert (folder / "report.md").read_text().startswith(f"{described}; 7 rows on 2026-11-24 at a1\n")
    assert (folder / "time.png").stat().st_size > 5000


def test_a_later_run_on_the_same_machine_is_put_into_the_results(tmp_path, rows):
    results = tmp_path / "results"
    assert main([str(saved(tmp_path / "run.json", rows)), "--output", str(results)]) == 0
    newer = [dataclasses.replace(rows[1], seconds=[0.3], commit="b2")]
    assert main([str(saved(tmp_path / "later.json", newer)), "--output", str(results)]) == 0
    text = (results / "some-cpu-2-threads" / "report.md").read_text()
    assert "| fake-2x64 | 500 ±20% | 300 | 100 ±0% |" in text
    assert "6 rows on 2026-11-24 at a1" in text
    assert "1 rows on 2026-11-24 at b2" in text
    # Another release of torch: nothing of the old one stays.
    assert main([str(saved(tmp_path / "other.json", rows[:1], torch="2.14.0")), "--output", str(results)]) == 0
    assert "| fake-2x64 | 500 ±20% |\n" in (results / "some-cpu-2-threads" / "report.md").read_text()


def test_runs_on_different_machines_are_not_put_together(tmp_path, rows, capsys):
    runs = [saved(tmp_path / "one.json", rows), saved(tmp_path / "two.json", rows, cpu="Other CPU")]
    assert main([*map(str, runs), "--output", str(tmp_path / "results")]) == 2
    assert "error: runs on different machines or versions: Some CPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("content", ["{}", "not json", '{"rows": [{"seconds": 1}], "machine": {}}'])
def test_a_file_of_another_kind_is_one_line_and_status_2(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main([str(path), "--output", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == f"error: {path}: expected a file that `pytest benchmarks` saved\n"
    assert not (tmp_path / "results").exists()


def test_nothing_saved_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "nothing saved; run `pytest benchmarks` first" in capsys.readouterr().err
    assert main(["missing.json"]) == 2
    assert "missing.json: cannot be read" in capsys.readouterr().err


def test_committed_results_are_what_their_rows_say():
    committed = list(report.RESULTS.glob("*/rows.json"))
    assert committed
    for path in committed:
        _, rows = report.read(path)
        assert tables(rows) in (path.parent / "report.md").read_text()
