"""The commands that a step may be: how each is started, what it leaves, and how its flags are checked beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from idrm.child_processes import REPOSITORY
from idrm.grid.runs import Run, require_runnable

PACKAGE = REPOSITORY / "idrm"


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        program: what follows the interpreter or, of a training, the launcher; the step's own tokens come after it.
        check: parses these tokens and raises InputError; called before any step is run.
        is_training: the user's launcher starts it, and it takes the flags that are for every training.
        is_grid: it starts trainings itself, and takes both to hand them on.
        writes_file: it leaves one .jsonl file, where the others leave a folder.
        goes_on: where it was interrupted it goes on, told so by --resume_from_checkpoint if it is a training;
            otherwise what it left is removed and it begins anew.
    """

    program: tuple[str, ...]
    check: Callable[[Sequence[str]], Any]
    is_training: bool = False
    is_grid: bool = False
    writes_file: bool = False
    goes_on: bool = False

    @property
    def output_flag(self) -> str:
        return "output_file" if self.writes_file else "output_dir"

    def start(self, launcher: Sequence[str]) -> list[str]:
        return [*(launcher if self.is_training else [sys.executable]), *self.program]


def _parser(module: str, *leading: str) -> Callable[[Sequence[str]], Any]:
    """A module's `parse_arguments`, imported when it is wanted: TRL is an extra."""

    def check(tokens: Sequence[str]) -> Any:
        return import_module(module).parse_arguments(*leading, [*tokens])

    return check


def _check_grid(tokens: Sequence[str]) -> None:
    require_runnable(grid_runs(tokens))


def grid_runs(tokens: Sequence[str]) -> list[Run]:
    """The runs of a grid step; InputError for a file that is none."""
    command = import_module("idrm.grid.command")
    return command.runs_of(*command.parse_arguments(tokens))


def _check_policy(action: str) -> Callable[[Sequence[str]], Any]:
    def check(tokens: Sequence[str]) -> Any:
        import_module("idrm.policy.command").require_extra(action)
        return _parser("idrm.policy.arguments", action)(tokens)

    return check


def _policy(action: str, goes_on: bool = True) -> Command:
    program = (str(PACKAGE / "policy" / "__main__.py"), action)
    return Command(program, _check_policy(action), is_training=True, goes_on=goes_on)


COMMANDS = {
    "embedded": Command(("-m", "idrm.embedded.materials"), _parser("idrm.embedded.materials")),
    "train": Command((str(PACKAGE / "train.py"),), _parser("idrm.arguments"), is_training=True, goes_on=True),
    "teacher": Command((str(PACKAGE / "teacher.py"),), _parser("idrm.nli.arguments"), is_training=True, goes_on=True),
    "grid": Command(("-m", "idrm", "grid"), _check_grid, is_grid=True, goes_on=True),
    "margins": Command(("-m", "idrm", "margins"), _parser("idrm.ensembles.margins_command"), writes_file=True),
    "average": Command(("-m", "idrm", "average"), _parser("idrm.ensembles.average_command")),
    "policy sft": _policy("sft"),
    "policy dpo": _policy("dpo"),
    "policy rloo": _policy("rloo"),
    "policy ppo": _policy("ppo", goes_on=False),
    "policy generate": Command(
        ("-m", "idrm", "policy", "generate"), _parser("idrm.policy.generation"), writes_file=True
    ),
    "judge": Command(("-m", "idrm", "judge"), _parser("idrm.judging.arguments"), goes_on=True),
}
