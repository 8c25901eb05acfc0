"""What docs/win-rates.md promises: commands parse, examples load, its Python runs, its table of flags is complete."""

import dataclasses
import re
import shlex
from pathlib import Path

from idrm.judging import Message, read_responses
from idrm.judging.arguments import JudgeArguments, parse_arguments

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "win-rates.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1]


def test_the_commands_parse():
    commands = re.findall(r"^idrm judge (.*)$", block("bash"), flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert parse_arguments(shlex.split(command)).responses == ("id-rm.jsonl", "bt-rm.jsonl")


def test_the_table_of_flags():
    shown = dict(re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? *\|", PAGE, flags=re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(JudgeArguments)}
    assert shown == {name: "" if default is None else str(default) for name, default in fields.items()}


def test_the_example_lines_are_responses(write_lines):
    lines = block("json").splitlines()
    responses = read_responses(write_lines("responses.jsonl", lines))
    assert [response.prompt for response in responses] == [(Message("user", "Is it far?"),)] * 2
    assert [response.identifier for response in responses] == [None, 17]


def test_the_python_runs(write_lines, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_lines("id-rm.jsonl", [{"prompt": prompt, "response": "short"} for prompt in "pqr"])
    others = {"p": "longer", "q": "l", "r": "other"}
    write_lines("bt-rm.jsonl", [{"prompt": prompt, "response": text} for prompt, text in others.items()])
    names = {}
    exec(block("python"), names)
    result = names["result"]
    assert (result.wins, result.loses, result.ties) == (1, 1, 1)


def test_named_files_exist():
    named = re.findall(r"`(idrm/[\w./]+)`", PAGE)
    assert named
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []
