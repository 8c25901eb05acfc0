"""Steps as processes, with a stub for every command: each once and when it can, resumed, stopped."""

import dataclasses
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
from idrm.arguments import parse_arguments as parse_training
from idrm.errors import InputError
from idrm.pipeline import specification, steps
from idrm.pipeline.commands import COMMANDS
from idrm.pipeline.specification import read_pipeline
from idrm.pipeline.steps import FINISHED_FILE, Place, StepFailed, require_runnable, run_steps

# Stands for a command: notes what it was started with, and leaves a folder or a file.
STUB = """
import json, os, sys, time
from pathlib import Path
flags = dict(token[2:].split("=", 1) for token in sys.argv[1:] if token.startswith("--") and "=" in token)
output = Path(flags.get("output_dir") or flags["output_file"])
notes = Path(sys.argv[0] + ".log")
def note(*entry):
    with notes.open("a") as file:
        print(json.dumps(entry), file=file, flush=True)
note("begin", output.stem, sys.argv[1:], output.exists())
if flags.get("run_name") == "fails":
    print("went wrong")
    sys.exit(3)
if flags.get("run_name") == "hangs":
    note("pid", output.stem, os.getpid())
    time.sleep(60)
if flags.get("run_name") == "waits":
    while sum('"begin"' in line for line in notes.read_text().splitlines()) < 2:
        time.sleep(0.02)
if output.suffix:
    output.write_text("{}\\n")
else:
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.yaml").write_text("{}")
note("end", output.stem)
"""


# Stands for a grid: its own child heeds no SIGTERM, and is killed after a second.
PARENT = """
import os, sys, signal
from pathlib import Path
from idrm import child_processes
from idrm.processes import termination_as_exit
child_processes.SECONDS_TO_END = 1
child = "import signal, os, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
child += f"p = {sys.argv[0] + '.pid'!r}; open(p + '~', 'w').write(str(os.getpid())); "
child += "os.rename(p + '~', p); time.sleep(60)"
crew = child_processes.Crew()
try:
    with termination_as_exit():
        crew.run([sys.executable, "-c", child], Path(sys.argv[0] + ".child.log"))
except BaseException:
    crew.stop()
    raise
"""

GRID = "seeds: [0]\nrows: [{name: InfoRM, overrides: {model_name_or_path: m, dataset_name: d, alpha: 0}}]\n"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Every command is the stub and checks nothing; returns its notes."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    stubs = {
        name: dataclasses.replace(command, program=(str(script),), check=lambda tokens: None)
        for name, command in COMMANDS.items()
    }
    monkeypatch.setattr(specification, "COMMANDS", stubs)
    log = Path(f"{script}.log")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def pipeline(tmp_path):
    """pipeline(steps): what a file with these steps says."""

    def read(entries: dict, **more):
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump({"steps": entries, **more}, sort_keys=False))
        return read_pipeline(path)

    return read


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "out", [sys.executable], ["--bf16=true"])


def run(pipeline, place, **more):
    require_runnable(pipeline, place)
    run_steps(pipeline, place, judge=None, **more)


def test_each_step_is_run_once_after_those_that_it_names(tmp_path, stub, pipeline, place):
    entries = {
        "models": {"command": "grid", "inputs": ["grid.yaml"], "training": {"alpha": 0}},
        "margins": {"command": "margins", "inputs": ["{models}/*.yaml"]},
        "model": {"command": "train", "config": "am.yaml", "flags": {"dataset_name": "{margins}", "layers": [-2, -1]}},
    }
    (tmp_path / "am.yaml").write_text("{}")
    (tmp_path / "grid.yaml").write_text(GRID)
    run(pipeline(entries), place)
    seen = {name: tokens for kind, name, tokens, _ in filter(lambda note: note[0] == "begin", stub())}
    out = place.folder / "steps"
    assert list(seen) == ["models", "margins", "model"]
    assert seen["models"] == [
        *(f"{tmp_path}/grid.yaml", f"--output_dir={out}/models", f"--launcher={sys.executable}"),
        *("--", "--alpha=0", "--bf16=true"),
    ]
    # The pattern stands for what the step before left.
    assert seen["margins"] == [f"{out}/models/run.yaml", f"--output_file={out}/margins.jsonl", "--overwrite=true"]
    assert seen["model"] == [
        *(f"--config={tmp_path}/am.yaml", f"--dataset_name={out}/margins.jsonl", "--layers", "-2", "-1"),
        *(f"--output_dir={out}/model", "--bf16=true"),
    ]
    assert set(json.loads((place.folder / FINISHED_FILE).read_text())) == set(seen)
    run(pipeline({**entries, "more": {"command": "average"}}), place)
    assert [note[1] for note in stub()] == ["models", "models", "margins", "margins", "model", "model", "more", "more"]
    assert sorted(path.name for path in (place.folder / "logs").iterdir()) == [
        *("margins.log", "model.log", "models.log", "more.log"),
    ]


def test_steps_that_do_not_need_one_another_run_together(stub, pipeline, place):
    waits = {"command": "train", "flags": {"run_name": "waits"}}
    last = {"command": "train", "flags": {"model_name_or_path": "{b}"}}
    run(pipeline({"a": waits, "b": waits, "c": last}), place, jobs=2)
    notes = [(kind, name) for kind, name, *_ in stub()]
    assert {notes[0], notes[1]} == {("begin", "a"), ("begin", "b")}
    assert notes.index(("end", "b")) < notes.index(("begin", "c"))


def test_a_failure_ends_the_others_and_the_next_call_goes_on(stub, pipeline, place):
    entries = {
        "hangs": {"command": "train", "flags": {"run_name": "hangs"}},
        "fails": {"command": "train", "flags": {"run_name": "fails"}},
        "never": {"command": "train", "flags": {"model_name_or_path": "{fails}"}},
    }
    with pytest.raises(
        StepFailed, match=r"the step fails failed with exit status 3; its log is .*fails\.log"
    ) as failure:
        run(pipeline(entries), place, jobs=2)
    assert failure.value.status == 3
    assert "went wrong" in failure.value.log.read_text()
    assert "never" not in [note[1] for note in stub()]
    assert not (place.folder / FINISHED_FILE).exists()


def test_what_was_interrupted_goes_on_or_begins_anew(stub, pipeline, place):
    """A training is told to resume; PPO cannot, and `idrm average` wants an empty folder."""
    for name in ("train", "ppo", "mean"):
        (place.folder / "steps" / name).mkdir(parents=True)
        (place.folder / "steps" / name / "run.yaml").write_text("{}")
    entries = {"train": "train", "ppo": "policy ppo", "mean": "average"}
    run(pipeline({name: {"command": command} for name, command in entries.items()}), place)
    begun = {name: (tokens[-1], was_there) for kind, name, tokens, was_there in (n for n in stub() if n[0] == "begin")}
    assert begun["train"] == ("--resume_from_checkpoint=true", True)
    assert begun["ppo"] == ("--bf16=true", False)
    assert begun["mean"] == (f"--output_dir={place.folder}/steps/mean", False)


def test_sigterm_ends_the_steps(stub, pipeline, place):
    def terminate():
        while not any(note[0] == "pid" for note in stub()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as ending:
        run(pipeline({"a": {"command": "train", "flags": {"run_name": "hangs"}}}), place)
    assert ending.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(next(note[2] for note in stub() if note[0] == "pid"), 0)


def test_a_finished_step_is_not_taken_for_another_one(tmp_path, stub, pipeline, place):
    (tmp_path / "am.yaml").write_text("alpha: 0\n")
    entries = {
        "model": {"command": "train", "config": "am.yaml", "flags": {"seed": 1, "dataset_name": "{pairs}"}},
        "judged": {"command": "judge", "flags": {"endpoint": "{judge}"}},
    }
    more = {"values": {"pairs": "p.jsonl"}, "embedded_judge": "judge"}
    before = pipeline(entries, **more)
    require_runnable(before, place)
    run_steps(before, place, judge="http://localhost:1/v1")
    # The judge's address is another one every time, and the folder may have been moved.
    require_runnable(before, place)
    os.rename(place.folder, tmp_path / "moved")
    place = dataclasses.replace(place, folder=tmp_path / "moved")
    require_runnable(before, place)
    run_steps(before, place, judge="http://localhost:2/v1")
    assert [note[1] for note in stub() if note[0] == "begin"] == ["model", "judged"]

    def refused(pipeline, place=place) -> str:
        with pytest.raises(InputError) as refusal:
            require_runnable(pipeline, place)
        return str(refusal.value)

    assert "step model was run with other flags; give another folder" in refused(
        pipeline(entries, **{**more, "values": {"pairs": "q.jsonl"}})
    )
    assert "step model was run with other command" in refused(
        pipeline({**entries, "model": {"command": "teacher"}}, **more)
    )
    assert "step model was run with other behind --" in refused(before, dataclasses.replace(place, training=[]))
    (tmp_path / "am.yaml").write_text("alpha: 1\n")
    assert "step model was run with other files" in refused(before)
    (tmp_path / "am.yaml").unlink()
    assert f"step model: {tmp_path}/am.yaml: no such file" in refused(before)


def test_a_moved_folder_with_a_grid_of_earlier_steps_is_the_same_pipeline(tmp_path, pipeline, place):
    """Its finished runs name the folder that they were trained in; nothing is held against that any more."""
    grid = {"seeds": [0], "training": {"dataset_name": "{data}", "model_name_or_path": "m", "alpha": 0}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, "rows": [{"name": "a"}]}))
    place = dataclasses.replace(place, training=[])
    content = pipeline(
        {
            "data": {"command": "margins", "inputs": ["m"], "flags": {"dataset_name": "d"}},
            "grid": {"command": "grid", "inputs": ["grid.yaml"], "flags": {"values": ["data={data}"]}},
            "mean": {"command": "average", "inputs": ["{grid}/runs/a/seed_*"]},
        }
    )
    folder = place.folder / "steps" / "grid" / "runs" / "a" / "seed_0"
    folder.mkdir(parents=True)
    flags = ["--dataset_name", str(place.folder / "steps" / "data.jsonl"), "--model_name_or_path", "m", "--alpha", "0"]
    (folder / "run.yaml").write_text(yaml.safe_dump(parse_training([*flags, "--seed", "0"]).recorded))
    finished = {step.name: {"step": place.description(step, content), "seconds": 1.0} for step in content.steps}
    (place.folder / FINISHED_FILE).write_text(json.dumps(finished))
    require_runnable(content, place)
    os.rename(place.folder, tmp_path / "moved")
    require_runnable(content, dataclasses.replace(place, folder=tmp_path / "moved"))
    (tmp_path / "moved" / FINISHED_FILE).write_text('{"data": 1}')
    with pytest.raises(InputError, match=r"finished_steps\.json: cannot be read; give another folder"):
        require_runnable(content, dataclasses.replace(place, folder=tmp_path / "moved"))


def test_a_folder_s_name_may_hold_what_patterns_are_made_of(tmp_path, stub, pipeline, place):
    (tmp_path / "grid.yaml").write_text(GRID)
    content = pipeline(
        {
            "grid": {"command": "grid", "inputs": ["grid.yaml"]},
            "mean": {"command": "average", "inputs": ["{grid}/runs/inform/seed_*"]},
            "all": {"command": "average", "inputs": ["{grid}/*.yaml"]},
        }
    )
    place = dataclasses.replace(place, folder=tmp_path / "new[1]")
    run(content, place)
    seen = {note[1]: note[2] for note in stub() if note[0] == "begin"}
    assert seen["all"][0] == f"{tmp_path}/new[1]/steps/grid/run.yaml"


def test_a_run_that_a_step_has_started_ends_with_the_pipeline(tmp_path, stub, pipeline, place, monkeypatch):
    """One that heeds no SIGTERM is ended by its step, which is given the time for it."""
    monkeypatch.setattr(child_processes, "SECONDS_TO_END", 1)
    monkeypatch.setattr(steps, "SECONDS_TO_END", 1)
    (tmp_path / "stub.py").write_text(PARENT)
    (tmp_path / "grid.yaml").write_text(GRID)
    pid_file = tmp_path / "stub.py.pid"

    def terminate():
        while not pid_file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit):
        run(pipeline({"grid": {"command": "grid", "inputs": ["grid.yaml"]}}), place)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_flags_are_parsed_as_each_command_parses_them_before_any_runs(tmp_path, pipeline, place):
    (tmp_path / "grid.yaml").write_text("seeds: [0]\nrows: [{name: a, overrides: {dataset_name: d, alpha: 1}}]\n")
    place = dataclasses.replace(place, training=[])
    wrong = {
        "train": ({"model_name_or_path": "m", "dataset_name": "d"}, "--alpha"),
        "teacher": ({"no_flag": 1}, "unrecognized arguments: --no_flag=1"),
        "grid": ({}, "row 'a': "),
        "margins": ({"dataset_name": "d"}, "expected reward models"),
        "average": ({}, "expected the folders of runs"),
        "policy dpo": ({"dataset_name": "d"}, "--model_name_or_path is missing"),
        "policy ppo": ({"model_name_or_path": "m", "dataset_name": "d"}, "--reward_model_name_or_path is missing"),
        "policy generate": ({"model_name_or_path": "m"}, "--dataset_name is missing"),
        "judge": ({}, "expected two response files"),
        "embedded": ({"train_pairs": 0}, "--train_pairs: expected at least 1"),
    }
    for command, (flags, message) in wrong.items():
        inputs = ["grid.yaml"] if command == "grid" else []
        entry = {"command": command, "flags": flags, "inputs": inputs}
        with pytest.raises(InputError) as refusal:
            require_runnable(pipeline({"a": entry}), place)
        assert str(refusal.value).startswith("step a: ")
        assert message in str(refusal.value)
    grid = {"command": "grid", "inputs": ["runs.yaml"]}
    (tmp_path / "runs.yaml").write_text(GRID)
    for run, fits in (("inform/seed_0", True), ("inform/seed_*", True), ("informrm/seed_0", False), ("x/*", False)):
        mean = pipeline({"grid": grid, "mean": {"command": "average", "inputs": [f"{{grid}}/runs/{run}"]}})
        if fits:
            require_runnable(mean, place)
        else:
            with pytest.raises(
                InputError, match=r"step mean: {grid}/runs/.* makes no such run; it makes runs/inform/s"
            ):
                require_runnable(mean, place)
    assert set(wrong) | {"policy sft", "policy rloo"} == set(COMMANDS)
    assert not place.folder.exists()
