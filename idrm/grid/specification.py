"""The file that describes a grid: rows of a table, each a training configuration with several seeds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idrm.errors import InputError
from idrm.grid.runs import Run
from idrm.yaml_files import filled, names_in_braces, read_yaml, require_mapping

# What a grid gives every run itself.
_ITS_OWN = ("seed", "output_dir")
_KEYS = ("title", "benchmarks", "seeds", "training", "baseline", "rows")
_ROW_KEYS = ("name", "config", "overrides", "seeds", "model", "paper")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: as the table has it; its folder is `slug`.
        flags: of `idrm train`, what the grid says of all rows included; `config` names a YAML file with more.
        seeds: a run for each; none for a row with a model.
        model: a finished model, which is evaluated and not trained; None for a row of runs.
        paper: what the paper printed of this row, by column of the table.
    """

    name: str
    flags: Mapping[str, Any]
    seeds: tuple[int, ...]
    model: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name.lower()).strip("-")

    def run(self, folder: Path, seed: int, flags: Mapping[str, Any] | None = None) -> Run:
        """The run of a seed, in a folder of its own below `folder`; `flags` win over the row's own."""
        return Run(self.name, seed, folder / self.slug / f"seed_{seed}", {**self.flags, **(flags or {})})


@dataclass(frozen=True)
class Grid:
    """What a grid file says.

    Attributes:
        title: of the table.
        rows: at least one; their names and slugs differ.
        baseline: the row that the others are compared with; None for no comparison.
        benchmarks: what the models are evaluated on, as `idrm eval --benchmark` takes them, by name.
    """

    title: str
    rows: tuple[Row, ...]
    baseline: str | None
    benchmarks: Mapping[str, str]


def read_grid(path: Path, seeds: Sequence[int] | None = None, values: Mapping[str, str] | None = None) -> Grid:
    """Reads a grid file.

    Args:
        seeds: those of every row of runs, instead of the file's.
        values: what {name} in any of its strings stands for.

    ::

        title: ...
        benchmarks: {name: source}          # idrm eval --benchmark name=source
        seeds: [0, 1, 2]
        training: {flag: value}             # of idrm train, for all rows
        baseline: name of a row
        rows:
          - name: ...
            config: run.yaml                # of idrm train, beside the grid file
            overrides: {flag: value}        # go before config and training; null takes one of those back
            seeds: [0, 1]                   # of this row, instead of the grid's
            model: folder                   # instead of all these: a finished model, only evaluated
            paper: {column: number}         # what the paper printed, shown beside

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of another kind than expected, or a name in braces
            that has no value.
    """
    content = read_yaml(path)
    unused = sorted((values or {}).keys() - set(names_in_braces(content)))
    if unused:
        raise InputError(f"--values {unused[0]}: {path} has no {{{unused[0]}}}")
    grid = grid_of(filled(content, values or {}, str(path)), str(path), path.parent)
    if seeds is None:
        return grid
    seeds = _seeds(list(seeds), "--seeds")
    rows = (row if row.model is not None else dataclasses.replace(row, seeds=seeds) for row in grid.rows)
    return dataclasses.replace(grid, rows=tuple(rows))


def grid_of(content: Any, where: str, folder: Path, more_keys: Sequence[str] = ()) -> Grid:
    """A grid from a file's content (`read_grid`); `more_keys` are legal and for the caller."""
    content = require_mapping(content, where, (*_KEYS, *more_keys))
    seeds = _seeds(content.get("seeds"), f"{where}: seeds")
    training = require_mapping(content.get("training") or {}, f"{where}: training")
    require_free(training, f"{where}: training")
    entries = content.get("rows")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: expected a list of rows, found {type(entries).__name__}")
    rows = []
    for number, entry in enumerate(entries, start=1):
        here = f"{where}: row {number}"
        entry = require_mapping(entry, here, _ROW_KEYS)
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            raise InputError(f"{here}: expected a name")
        flags = {} if entry.get("model") is not None else dict(training)
        if entry.get("config") is not None:
            flags = {"config": folder / str(entry["config"]), **flags}
        overrides = require_mapping(entry.get("overrides") or {}, f"{here}: overrides")
        require_free(overrides, f"{here}: overrides")
        flags |= overrides
        flags = {name: value for name, value in flags.items() if value is not None}
        model = entry.get("model")
        if model is not None:
            given = [key for key in ("config", "overrides", "seeds") if key in entry]
            if not isinstance(model, str) or given:
                found = f"{given[0]} beside it" if given else repr(model)
                raise InputError(f"{here}: model: expected a model's folder or hub name alone, found {found}")
        own_seeds = () if model is not None else _seeds(entry.get("seeds"), f"{here}: seeds") or seeds
        if not own_seeds and model is None:
            raise InputError(f"{here}: expected seeds, here or for all rows")
        paper = require_mapping(entry.get("paper") or {}, f"{here}: paper")
        for column, value in paper.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InputError(f"{here}: paper: expected a number for {column!r}, found {value!r}")
        rows.append(Row(entry["name"], flags, own_seeds, model, paper))
    slugs = [row.slug for row in rows]
    for row in rows:
        if slugs.count(row.slug) > 1 or not row.slug:
            raise InputError(f"{where}: expected rows with names of their own, found {row.name!r} again or empty")
    baseline = content.get("baseline")
    if baseline is not None and baseline not in [row.name for row in rows if row.model is None]:
        raise InputError(f"{where}: baseline: expected the name of a row of runs, found {baseline!r}")
    benchmarks = require_mapping(content.get("benchmarks") or {}, f"{where}: benchmarks")
    return Grid(str(content.get("title") or where), tuple(rows), baseline, benchmarks)


def require_free(flags: Mapping[str, Any], where: str) -> None:
    """Raises InputError for flags of training that the grid itself gives every run."""
    for name in _ITS_OWN:
        if name in flags:
            raise InputError(f"{where}: {name}: is the grid's to give; expected other flags of `idrm train`")


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    are_integers = isinstance(value, list) and all(isinstance(seed, int) and seed >= 0 for seed in value)
    if not are_integers or not value or len(set(value)) < len(value):
        raise InputError(f"{where}: expected a list of different integers from 0, found {value!r}")
    return tuple(value)
