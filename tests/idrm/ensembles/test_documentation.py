"""What docs/ensembles.md promises: its commands parse, its table of flags is complete, its files are there."""

import dataclasses
import re
import shlex
from pathlib import Path

from idrm.arguments import parse_arguments as parse_training
from idrm.ensembles.average_command import parse_arguments as parse_average
from idrm.ensembles.margins_command import MarginArguments
from idrm.ensembles.margins_command import parse_arguments as parse_margins

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "ensembles.md").read_text(encoding="utf-8")


def commands(name):
    return [shlex.split(flags) for flags in re.findall(rf"^idrm {name} (.*)$", PAGE, flags=re.MULTILINE)]


def test_the_commands_parse():
    (margins,) = commands("margins")
    assert len(parse_margins(margins)[0]) == 3
    assert [len(parse_average(flags)[0]) for flags in commands("average")] == [3, 2]
    head, *runs = [parse_training(flags) for flags in commands("train")]
    assert head.model.linear_probing
    assert {run.model.model_name_or_path for run in runs} == {str(head.output_dir)}
    assert len({run.training["seed"] for run in runs}) == len(runs) == 2


def test_the_table_of_flags():
    shown = dict(re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? *\|", PAGE, flags=re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(MarginArguments)}
    assert shown == {name: "" if value is None else str(value).lower() for name, value in fields.items()}
