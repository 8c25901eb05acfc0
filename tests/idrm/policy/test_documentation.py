"""What docs/policies.md promises: its commands parse, its tables of flags are complete."""

import dataclasses
import re
import shlex
from pathlib import Path

from idrm.judging.command import parse_arguments as parse_judge
from idrm.policy.arguments import PolicyArguments, RewardModelArguments, parse_arguments
from idrm.policy.generation import GenerationArguments
from idrm.policy.generation import parse_arguments as parse_generation

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "policies.md").read_text(encoding="utf-8")


def commands(pattern):
    return [shlex.split(flags) for flags in re.findall(rf"^{pattern} (.*)$", PAGE, flags=re.MULTILINE)]


def table(title):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? *\|", section, flags=re.MULTILINE))


def defaults(*kinds):
    fields = {entry.name: entry.default for kind in kinds for entry in dataclasses.fields(kind)}
    return {name: "" if value is None else str(value).lower() for name, value in fields.items()}


def test_the_commands_parse(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    training = [flags for flags in commands("idrm policy") if flags[0] != "generate"]
    runs = [parse_arguments(action, flags) for action, *flags in training + commands("deepspeed --module idrm.policy")]
    assert [run.action for run in runs] == ["sft", "dpo", "rloo", "ppo", "dpo"]
    written = [parse_generation(flags[1:]).output_file for flags in commands("idrm policy") if flags[0] == "generate"]
    (judge,) = commands("idrm judge")
    assert judge[:2] == written
    parse_judge(judge)


def test_the_tables_of_flags():
    assert table("Flags") == defaults(PolicyArguments, RewardModelArguments)
    assert table("Responses") == defaults(GenerationArguments)
