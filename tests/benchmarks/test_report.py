"""Tables and plots of rows, and the command that writes them."""

import json

import pytest

from benchmarks import report
from benchmarks.measurement import Measurement
from benchmarks.report import Row, exponent, main, tables

MACHINE = {
    "cpu": "Some CPU, 2 threads",
    "cpu_instructions": "avx2",
    "python": "3.11.7",
    "torch": "2.13.0",
    "commit": "a1",
}


@pytest.fixture
def rows(fake_contest):
    measured = {
        "naive": Measurement([0.4, 0.5, 0.6], peak_bytes=300 << 20),
        "torch": Measurement([0.2], peak_bytes=40 << 20),
        "cpp": Measurement([0.1, 0.1, 0.1], peak_bytes=30 << 20),
        "sdpa": Measurement([0.05], peak_bytes=10 << 20),
    }
    rows = [Row.of(fake_contest(), name, measurement) for name, measurement in measured.items()]
    rows += [
        Row.of(fake_contest(length=2000), "naive", Measurement(needed_bytes=64 << 30)),
        Row.of(fake_contest(length=2000), "torch", Measurement(failure="torch is wrong")),
        Row.of(fake_contest(length=2000), "cpp", Measurement([1.5], peak_bytes=123 << 20)),
    ]
    return rows


def saved(path, rows, **changes):
    content = {
        "rows": [row.as_dict() for row in rows],
        "machine_info": {"idrm": MACHINE},
        "datetime": "2026-11-24T10:00",
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_table_has_medians_ratios_and_memory(rows):
    text = tables(rows)
    assert "| fake-2x64 | 500 ±20% | 200 | 100 ±0% | 50.0 | 5.00 | 2.00 | 2.00 | 0.00 |" in text
    assert "| fake-2x64 | 300 | 40.0 | 30.0 | 10.0 |" in text


def test_what_did_not_run_and_what_is_wrong_are_named(rows):
    text = tables(rows)
    assert "| fake-2x2000 | out of memory | wrong | 1500 |  |" in text
    assert "| fake-2x2000 | would need 65536 | wrong | 123 |  |" in text
    assert "- fake-2x2000, torch: torch is wrong" in text


def test_exponents_are_those_of_the_largest_sizes():
    assert exponent([(n, 3e-9 * n**2) for n in (512, 1024, 2048, 4096)]) == pytest.approx(2)
    assert exponent([(64, 100.0), (512, 1.0), (1024, 2.0), (2048, 4.0)]) == pytest.approx(1)
    assert exponent([(512, 1.0)]) is None


def test_the_command_writes_tables_rows_and_plots(tmp_path, rows, capsys):
    assert main([str(saved(tmp_path / "run.json", rows)), "--output", str(tmp_path / "results")]) == 0
    folder = tmp_path / "results" / "some-cpu-2-threads"
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"report.md", "rows.json", "memory.png", "time.png"}
    text = (folder / "report.md").read_text()
    assert text.startswith("Some CPU, 2 threads; python 3.11.7, torch 2.13.0, instructions avx2; 2026-11-24, commit a1")
    assert (folder / "time.png").stat().st_size > 5000
    # What it wrote is what it reads, and a later file's rows take the place of an earlier one's.
    newer = [Row(**{**row.as_dict(), "seconds": 0.3}) for row in rows if row.variant == "torch" and row.seconds]
    later = saved(tmp_path / "later.json", newer)
    assert main([str(folder / "rows.json"), str(later), "--output", str(tmp_path / "again")]) == 0
    text = (tmp_path / "again" / "some-cpu-2-threads" / "report.md").read_text()
    assert "| fake-2x64 | 500 ±20% | 300 | 100 ±0% |" in text


@pytest.mark.parametrize("content", ["{}", "not json", '{"rows": [{"seconds": 1}], "machine": {}, "date": ""}'])
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


def test_committed_results_can_be_read_again():
    for path in report.RESULTS.glob("*/rows.json"):
        content = report.read(path)
        folder = path.parent
        assert content["rows"]
        assert tables(content["rows"]) in (folder / "report.md").read_text()
