"""The file that describes a pipeline: steps, each a command with flags, and the tables that are made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idrm.errors import InputError
from idrm.pipeline.commands import COMMANDS, Command
from idrm.yaml_files import filled, names_in_braces, read_yaml, require_mapping, strings_in

_KEYS = ("title", "note", "values", "embedded_judge", "steps", "tables")
_STEP_KEYS = ("command", "each", "inputs", "config", "flags", "training")
_EACH = "each"
_TABLE_KEYS = ({"grid"}, {"title", "judged"})
# What a step is told where its output goes, and what the pipeline tells it as it begins.
_ITS_OWN = ("output_dir", "output_file", "resume_from_checkpoint", "overwrite", "launcher", "config")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step; {name} in a later one stands for what this one leaves.
        kind: its command.
        inputs: its arguments without flags; a relative path is taken from the pipeline file's folder.
        flags: its flags, with those of `config` going behind them.
        config: YAML file with flags, None for none.
        training: of a grid, flags that all its runs are given.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    flags: Mapping[str, Any]
    config: Path | None
    training: Mapping[str, Any]

    @property
    def command(self) -> Command:
        return COMMANDS[self.kind]

    @property
    def texts(self) -> list[str]:
        """All strings in which names may stand in braces."""
        return list(strings_in([self.inputs, self.flags, self.training]))

    @property
    def placeholders(self) -> list[str]:
        """The names in braces, in the order they stand there."""
        return list(names_in_braces(self.texts))

    @property
    def files(self) -> list[Path]:
        """Files that say what it does, beside the pipeline's own."""
        grid = [Path(text) for text in self.inputs if self.command.is_grid]
        return [*grid, *([self.config] if self.config is not None else [])]

    @property
    def location(self) -> str:
        """Of what it leaves, below the pipeline's folder."""
        return f"steps/{self.name}{'.jsonl' if self.command.writes_file else ''}"


@dataclass(frozen=True)
class Table:
    """One of the tables: that of a grid step, or the win rates of judge steps by the opponent's name.

    Attributes:
        title: of a table of win rates; a grid has its own.
        grid: the step, None for a table of win rates.
        judged: judge steps by what their row is called.
    """

    title: str | None
    grid: str | None
    judged: Mapping[str, str]


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline file says.

    Attributes:
        title, note: of all tables; the note stands below each title.
        values: what names in braces stand for, steps aside.
        embedded_judge: the name that stands for the address of the embedded demonstration's judge, which runs as long
            as the pipeline does; None for no such judge.
        steps: in an order in which each comes after those that it names.
        tables: in the order that they are written.
    """

    title: str
    note: str | None
    values: Mapping[str, str]
    embedded_judge: str | None
    steps: tuple[Step, ...]
    tables: tuple[Table, ...]


def read_pipeline(path: Path, values: Mapping[str, str] | None = None) -> Pipeline:
    """Reads a pipeline file; `values` go before its own.

    ::

        title: ...
        note: ...                                 # below the title of every table
        values: {name: text}                      # {name} in what follows; null: to be given by --values
        embedded_judge: name                      # {name} is the address of the embedded judge
        steps:
          margins:                                # {margins} is what it leaves
            command: margins                      # one of `commands.COMMANDS`
            inputs: ["{runs}/runs/bt/seed_*"]     # what stands there without a flag
            config: file.yaml                     # beside this file
            flags: {flag: value}                  # win over config; null: not given
            training: {flag: value}               # of a grid: for all its runs
            each: {name: text}                    # a step for each, STEP-NAME, {each} in it being the text
        tables:
          - {grid: step}
          - {title: ..., judged: {name of a row: step}}

    Raises:
        InputError: no such file, not YAML, an unknown key or command, a value of another kind than expected, or a name
            in braces that is neither a value nor an earlier step.
    """
    where = str(path)
    content = require_mapping(read_yaml(path), where, _KEYS)
    known = _values(content, values or {}, where)
    judge = content.get("embedded_judge")
    if judge is not None and (not isinstance(judge, str) or judge in known):
        raise InputError(f"{where}: embedded_judge: expected a name of its own, found {judge!r}")
    names = {*known, *([judge] if judge is not None else [])}
    steps = []
    for step in _steps(content.get("steps") or {}, where, path.parent):
        if step.name in names:
            raise InputError(f"{where}: step {step.name}: expected a name that no value and no other step has")
        for placeholder in step.placeholders:
            if placeholder not in names:
                raise InputError(f"{where}: step {step.name}: {{{placeholder}}} is neither a value nor an earlier step")
        names.add(step.name)
        steps.append(step)
    if not steps:
        raise InputError(f"{where}: expected steps, found none")
    kinds = {step.name: step.kind for step in steps}
    tables = content.get("tables") or []
    if not isinstance(tables, list):
        raise InputError(f"{where}: tables: expected a list, found {tables!r}")
    tables = [_table(entry, f"{where}: tables", kinds) for entry in tables]
    note = content.get("note")
    return Pipeline(
        str(content.get("title") or where),
        note and " ".join(str(note).split()),
        known,
        judge,
        tuple(steps),
        tuple(tables),
    )


def _values(content: Mapping[str, Any], given: Mapping[str, str], where: str) -> dict[str, str]:
    own = require_mapping(content.get("values") or {}, f"{where}: values")
    unknown = [name for name in given if name not in own]
    if unknown:
        raise InputError(f"--values {unknown[0]}: {where} has no such value; it has {', '.join(own) or 'none'}")
    values = {**own, **given}
    for name, value in values.items():
        if value is None:
            raise InputError(f"{where}: {name} has to be given: --values {name}=...")
    return {name: str(value) for name, value in values.items()}


def _steps(entries: Any, where: str, folder: Path) -> Iterator[Step]:
    for name, entry in require_mapping(entries, f"{where}: steps").items():
        here = f"{where}: step {name}"
        entry = require_mapping(entry, here, _STEP_KEYS)
        if _EACH not in entry:
            yield _step(str(name), entry, here, folder)
            continue
        if not require_mapping(entry[_EACH], f"{here}: {_EACH}"):
            raise InputError(f"{here}: {_EACH}: expected a name with a text at least, found none")
        for suffix, text in entry[_EACH].items():
            yield _step(f"{name}-{suffix}", _for_each(entry, str(text)), here, folder)


def _for_each(content: Any, text: str) -> Any:
    """A step's entry with {each} replaced."""
    names = {name: f"{{{name}}}" for name in names_in_braces(content)}
    return filled(content, {**names, _EACH: text}, "")


def _step(name: str, entry: dict[str, Any], where: str, folder: Path) -> Step:
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{where}: expected a name of letters, digits, '_', '.' and '-'")
    kind = entry.get("command")
    if not isinstance(kind, str) or kind not in COMMANDS:
        raise InputError(f"{where}: command: expected one of {', '.join(COMMANDS)}, found {kind!r}")
    inputs = entry.get("inputs") or []
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise InputError(f"{where}: inputs: expected a list of paths, found {inputs!r}")
    flags, training = (require_mapping(entry.get(key) or {}, f"{where}: {key}") for key in ("flags", "training"))
    for given in (*flags, *training):
        if given in _ITS_OWN:
            raise InputError(f"{where}: {given}: is the pipeline's to give")
    if training and not COMMANDS[kind].is_grid:
        raise InputError(f"{where}: training: is for a grid; give flags")
    config = entry.get("config")
    return Step(
        name=name,
        kind=kind,
        inputs=tuple(text if text.startswith("{") else str(folder / text) for text in inputs),
        flags={flag: value for flag, value in flags.items() if value is not None},
        config=None if config is None else folder / str(config),
        training={flag: value for flag, value in training.items() if value is not None},
    )


def _table(entry: Any, where: str, kinds: Mapping[str, str]) -> Table:
    if not isinstance(entry, dict) or set(entry) not in _TABLE_KEYS:
        raise InputError(f"{where}: expected {{grid: step}} or {{title: ..., judged: {{row: step}}}}, found {entry!r}")
    judged = require_mapping(entry.get("judged") or {}, f"{where}: judged")
    for kind, names in (("grid", [entry["grid"]] if "grid" in entry else []), ("judge", judged.values())):
        for name in names:
            if not isinstance(name, str) or kinds.get(name) != kind:
                raise InputError(f"{where}: expected the name of a {kind} step, found {name!r}")
    return Table(entry.get("title"), entry.get("grid"), judged)
