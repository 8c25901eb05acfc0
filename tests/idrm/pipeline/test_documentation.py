"""What docs/pipelines.md promises: its file is a pipeline, its commands parse, its table of flags is complete."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

from idrm.pipeline.command import PipelineArguments, parse_arguments
from idrm.pipeline.commands import COMMANDS
from idrm.pipeline.specification import read_pipeline
from idrm.pipeline.steps import Place, require_runnable

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "pipelines.md").read_text(encoding="utf-8")
PAPER = REPOSITORY / "recipes" / "paper"


def test_the_commands_parse(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    tiny, whole = (shlex.split(flags) for flags in re.findall(r"^idrm pipeline (.*)$", PAGE, flags=re.MULTILINE))
    assert parse_arguments(tiny)[1].jobs == 2
    pipeline, arguments, training = parse_arguments(whole)
    assert pipeline.values["judge_model"] == "Qwen/Qwen3-32B"
    assert (arguments.launcher, training) == ("deepspeed --num_gpus 8", ["--deepspeed", "ds_zero3.json"])


def test_the_file_is_a_pipeline_all_of_whose_flags_parse(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "pipeline.yaml").write_text(text)
    for name, source in {
        "margin-models.yaml": (PAPER / "table-2" / "margin-models.yaml").read_text().replace("../", f"{PAPER}/"),
        "adaptive-margin.yaml": (PAPER / "table-2" / "adaptive-margin.yaml").read_text(),
        "rloo.yaml": (PAPER / "table-1" / "rloo.yaml").read_text(),
    }.items():
        (tmp_path / name).write_text(source)
    pipeline = read_pipeline(tmp_path / "pipeline.yaml", {"judge_endpoint": "http://localhost/v1"})
    assert len(pipeline.steps) == 8
    require_runnable(pipeline, Place(tmp_path / "out", [sys.executable], []))


def test_the_tables_of_flags_and_commands():
    shown = dict(re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? *\|", PAGE, flags=re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(PipelineArguments)} | {"launcher": None}
    assert shown == {name: "" if value is None else str(value).lower() for name, value in fields.items()}
    (listed,) = re.findall(r"A step's command is one of (.*?)\. Where", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"`(.*?)`", listed.replace("\n", " "))) == set(COMMANDS)
