"""What a study's recipe says: a grid of training runs, the folds that each is run on, its student and its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from idrm.errors import InputError
from idrm.grid.specification import Grid, grid_of
from idrm.untrained_student import Size
from idrm.yaml_files import read_yaml

_KEYS = ("folds", "fold_seed", "student", "teacher")
_INTEGERS = (("folds", 5), ("fold_seed", 0))


@dataclass(frozen=True)
class Recipe:
    """A study.

    Attributes:
        grid: its rows, whose flags may hold {tuned_teacher}, {untuned_teacher} and {teacher_cache}.
        folds, fold_seed: how pairs are divided (`folds.divide_by_prompt`).
        student: the shape of the untrained students.
        teacher: flags of `idrm teacher` in a YAML file.
    """

    grid: Grid
    folds: int
    fold_seed: int
    student: Size
    teacher: Path

    @property
    def seeds(self) -> list[int]:
        """All seeds of any row."""
        return sorted({seed for row in self.grid.rows for seed in row.seeds})


def read_recipe(path: Path) -> Recipe:
    """Reads a study's recipe: a grid file (`grid.specification.read_grid`) without benchmarks, and four keys more.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, or a value of another kind than expected.
    """
    content = read_yaml(path)
    where = str(path)
    grid = grid_of(content, where, path.parent, _KEYS)
    for row in grid.rows:
        if row.model is not None:
            raise InputError(f"{where}: row {row.name!r}: model: a study trains all its rows on folds of their own")
    folds, fold_seed = (_integer(content.get(name, default), f"{where}: {name}") for name, default in _INTEGERS)
    if folds < 2:
        raise InputError(f"{where}: folds: expected 2 at least, found {folds}")
    known = {entry.name for entry in fields(Size)}
    shape = content.get("student") or {}
    if not isinstance(shape, Mapping) or not shape.keys() <= known:
        raise InputError(f"{where}: student: expected a mapping of {', '.join(sorted(known))}, found {shape!r}")
    student = Size(**{name: _integer(value, f"{where}: student: {name}") for name, value in shape.items()})
    if not isinstance(content.get("teacher"), str):
        raise InputError(f"{where}: teacher: expected a YAML file with flags of `idrm teacher`")
    return Recipe(grid, folds, fold_seed, student, path.parent / content["teacher"])


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: expected an integer from 0, found {value!r}")
    return value
