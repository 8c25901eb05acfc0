"""Runs as processes: each once, several at a time, resumed, and stopped with the first that fails."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from idrm import child_processes
from idrm.arguments import parse_arguments
from idrm.child_processes import last_lines, require_program
from idrm.errors import InputError
from idrm.grid.runs import (
    Run,
    RunFailed,
    last_training_record,
    require_runnable,
    train_runs,
)

# Stands for Python: notes what it was started with, and leaves what a finished run leaves.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(token.split("=", 1) for token in sys.argv[2:])
folder = Path(flags["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open(sys.argv[0] + ".log", "a") as log:
    print("begin", folder.name, "resumed" if "--resume_from_checkpoint" in flags else "", file=log, flush=True)
    if folder.name == "fails":
        while "begin hangs" not in Path(log.name).read_text():
            time.sleep(0.05)
        print("went wrong")
        sys.exit(3)
    if folder.name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", os.getpid(), file=log, flush=True)
    if folder.name in ("hangs", "stubborn"):
        time.sleep(60)
    time.sleep(0.2)
    print("end", folder.name, file=log, flush=True)
(folder / "config.json").write_text("{}")
(folder / "all_results.json").write_text("{}")
"""


@pytest.fixture
def launcher(tmp_path):
    """(tokens of the stub, its log's lines)."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    log = Path(f"{script}.log")
    return [sys.executable, str(script)], lambda: log.read_text().split("\n")[:-1] if log.exists() else []


def make_run(folder: Path, **flags) -> Run:
    values = {"model_name_or_path": "m", "dataset_name": "d", "alpha": 0, **flags}
    return Run("a row", 1, folder, values)


def test_each_run_is_trained_once_and_an_interrupted_one_goes_on(tmp_path, launcher):
    command, log = launcher
    runs = [make_run(tmp_path / name) for name in ("first", "second", "third")]
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "run.yaml").write_text("")
    train_runs(runs, log_folder=tmp_path / "logs", launcher=command)
    assert log() == ["begin first ", "end first", "begin second resumed", "end second", "begin third ", "end third"]
    assert all(run.is_finished for run in runs)
    train_runs(runs, log_folder=tmp_path / "logs", launcher=command)
    assert len(log()) == 6
    assert len(list((tmp_path / "logs").iterdir())) == 3


def test_several_at_a_time(tmp_path, launcher):
    command, log = launcher
    train_runs([make_run(tmp_path / f"run_{i}") for i in range(4)], log_folder=tmp_path / "l", launcher=command, jobs=2)
    lines = log()
    assert sorted(lines[:2]) == ["begin run_0 ", "begin run_1 "]
    assert len(lines) == 8


def test_the_first_failure_ends_the_others(tmp_path, launcher):
    command, log = launcher
    runs = [make_run(tmp_path / name) for name in ("hangs", "fails", "never")]
    with pytest.raises(RunFailed, match=r"fails failed with exit status 3; its log is .*fails\.log") as failure:
        train_runs(runs, log_folder=tmp_path / "logs", launcher=command, jobs=2)
    assert failure.value.status == 3
    assert "went wrong" in last_lines(failure.value.log)
    # Neither came to its end, and the third was not begun.
    assert sorted(log()) == ["begin fails ", "begin hangs "]


def test_sigterm_ends_the_runs_too_those_that_do_not_heed_it(tmp_path, launcher, monkeypatch):
    command, log = launcher
    monkeypatch.setattr(child_processes, "SECONDS_TO_END", 0.5)

    def terminate():
        while not any(line.startswith("deaf") for line in log()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as ending:
        train_runs([make_run(tmp_path / "stubborn")], log_folder=tmp_path / "logs", launcher=command)
    assert ending.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    pid = int(log()[-1].split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_launcher_that_is_not_there_is_refused():
    require_program("--launcher", [sys.executable, "-u"])
    for wrong in ([], ["no-such-launcher", "--num_gpus", "8"]):
        with pytest.raises(InputError, match=r"--launcher .*expected a program that is installed"):
            require_program("--launcher", wrong)


def test_a_folder_of_another_run_is_refused_before_anything_starts(tmp_path):
    run = make_run(tmp_path / "run", learning_rate=0.1)
    require_runnable([run])
    run.folder.mkdir()
    recorded = parse_arguments(run.tokens).recorded
    (run.folder / "run.yaml").write_text(yaml.safe_dump(recorded | {"output_dir": "moved"}))
    require_runnable([run])
    with pytest.raises(InputError, match=r"holds another run, with learning_rate 0\.1 and not 0\.2"):
        require_runnable([make_run(run.folder, learning_rate=0.2)])
    with pytest.raises(InputError, match=r"holds another run, with learning_rate 0\.1 and not 'not given'"):
        require_runnable([make_run(run.folder)])


def test_a_run_of_an_earlier_version_has_what_came_later_at_its_default(tmp_path):
    run = make_run(tmp_path / "run")
    recorded = parse_arguments(run.tokens).recorded
    assert recorded.pop("linear_probing") is False
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(yaml.safe_dump(recorded))
    require_runnable([run])
    with pytest.raises(InputError, match="holds another run, with linear_probing False and not True"):
        require_runnable([make_run(run.folder, linear_probing=True)])


def test_flags_that_training_refuses_are_refused_with_their_row(tmp_path):
    with pytest.raises(InputError, match="row 'a row': --alpha"):
        require_runnable([make_run(tmp_path / "run", alpha=1.0)])


def test_the_last_record_of_a_metric(tmp_path):
    run = make_run(tmp_path)
    history = [{"loss": 2.0, "interaction_ratio": 0.9}, {"loss": 1.0, "interaction_ratio": 0.8}, {"train_loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert last_training_record(run, "interaction_ratio") == 0.8
    assert last_training_record(run, "margin") is None
