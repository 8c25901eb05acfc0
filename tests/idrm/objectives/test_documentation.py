"""What docs/objectives.md promises: its commands parse, its flags are all there, its margins are those in use."""

import dataclasses
import re
import shlex
from fractions import Fraction
from pathlib import Path

from idrm.arguments import LLAMA2_MARGINS, ObjectiveArguments
from idrm.arguments import parse_arguments as parse_training
from idrm.ensembles.margins import MEAN_COLUMN
from idrm.ensembles.margins_command import parse_arguments as parse_margins

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_the_commands_parse():
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", "")
    margins, training = (shlex.split(line)[2:] for line in shell.splitlines())
    written = parse_margins(margins)[1]
    run = parse_training(training)
    assert run.data.dataset_name == written.output_file
    assert run.objective.margin_column == MEAN_COLUMN == ObjectiveArguments().flip_column


def test_every_flag_is_explained():
    assert set(re.findall(r"`--(\w+)", PAGE)) >= {field.name for field in dataclasses.fields(ObjectiveArguments)}


def test_the_discrete_margins():
    for name, margins in LLAMA2_MARGINS.items():
        row = re.search(rf"^\| `{name}` \|(.*)\|$", PAGE, flags=re.MULTILINE)[1]
        shown = [float(Fraction(cell.strip())) for cell in row.split("|")]
        assert shown == list(margins.values())[:4]
        assert list(margins.values())[4] == 0
