"""The table of a grid: every row's scores over its seeds, what the paper printed, and differences from the baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from idrm.errors import InputError
from idrm.evaluation.benchmark import Benchmark, Score
from idrm.evaluation.outcomes import Outcomes
from idrm.evaluation.statistics import smallest_wilcoxon, wilcoxon
from idrm.grid.specification import Grid, Row
from idrm.run_folder import write_whole

MARKDOWN_FILE, JSON_FILE = "grid.md", "grid.json"
PAPER = "as the paper printed it"


@dataclass(frozen=True)
class Column:
    """A score of one benchmark; its name is what a row's `paper` calls it."""

    name: str
    benchmark: str
    score: Score

    def value(self, outcomes: Mapping[str, Outcomes]) -> float:
        """In percent, of one run's outcomes by benchmark."""
        of_benchmark = outcomes[self.benchmark]
        return 100 * self.score.within(of_benchmark.subset, of_benchmark.won)


def columns_of(benchmarks: Sequence[Benchmark]) -> list[Column]:
    """The main scores of all benchmarks, called "benchmark score", or by the benchmark where it has just one."""
    columns = []
    for benchmark in benchmarks:
        scores = [score for score in benchmark.scores if not score.is_detail]
        columns += [
            Column(benchmark.name if len(scores) == 1 else f"{benchmark.name} {score.name}", benchmark.name, score)
            for score in scores
        ]
    return columns


def require_columns(grid: Grid, columns: Sequence[Column]) -> None:
    """Raises InputError for a number of the paper that the table has no column for."""
    names = [column.name for column in columns]
    for row in grid.rows:
        for name in row.paper:
            if name not in names:
                raise InputError(f"row {row.name!r}: paper: no column {name!r}; expected one of {', '.join(names)}")


@dataclass(frozen=True)
class Cell:
    """One row's scores in one column, in percent.

    Attributes:
        values: of every seed, in the row's order; of a row's model, its one.
        paper: what the paper printed, None where it is not known.
        difference: mean difference from the baseline over the seeds that both have; None for the baseline itself.
        wilcoxon: its p-value over these seeds.
    """

    values: tuple[float, ...]
    paper: float | None
    difference: float | None
    wilcoxon: float | None


def cells_of(
    grid: Grid, columns: Sequence[Column], outcomes: Mapping[str, Mapping[int | None, Mapping[str, Outcomes]]]
) -> dict[str, dict[str, Cell]]:
    """By row and column; `outcomes` are by row, seed (None of a row's model) and benchmark."""
    values = {
        row.name: {
            column.name: {seed: column.value(of_seed) for seed, of_seed in outcomes[row.name].items()}
            for column in columns
        }
        for row in grid.rows
    }
    return {
        row.name: {column.name: _cell(row, column.name, values, grid.baseline) for column in columns}
        for row in grid.rows
    }


def _cell(row: Row, column: str, values: Mapping[str, Any], baseline: str | None) -> Cell:
    own = values[row.name][column]
    difference = p_value = None
    if baseline not in (None, row.name):
        theirs = values[baseline][column]
        seeds = [seed for seed in own if seed in theirs]
        if seeds:
            ours, others = ([of_row[seed] for seed in seeds] for of_row in (own, theirs))
            difference = float(np.mean(ours) - np.mean(others))
            p_value = wilcoxon(ours, others)
    return Cell(tuple(own.values()), row.paper.get(column), difference, p_value)


def write_table(
    folder: Path, grid: Grid, cells: Mapping[str, Mapping[str, Cell]], benchmarks: Sequence[Benchmark]
) -> None:
    """Writes grid.md and grid.json into the folder, and prints the table."""
    columns = list(next(iter(cells.values())))
    lines = [["", *columns]]
    for row in grid.rows:
        lines.append([f"{row.name} ({_seeds(row)})", *(_summary(cells[row.name][column].values) for column in columns)])
        if row.paper:
            printed = [cells[row.name][column].paper for column in columns]
            lines.append([f"{row.name}, {PAPER}", *("" if value is None else f"{value:.2f}" for value in printed)])
    text = [f"# {grid.title}", "", *markdown_table(lines), "", "Percent, mean over the seeds and their range.", ""]
    if grid.baseline is not None:
        differences = [["", *columns]]
        for row in grid.rows:
            if row.name != grid.baseline and row.model is None:
                differences.append([row.name, *(_difference(cells[row.name][column]) for column in columns)])
        most = max(len(row.seeds) for row in grid.rows)
        text += [f"## Difference from {grid.baseline}", "", *markdown_table(differences), ""]
        explanation = (
            "Points, mean over the seeds that both have, with the p-value of Wilcoxon's signed ranks over these seeds, "
            f"which for {most} seeds cannot be below {smallest_wilcoxon(most):.3g}. `idrm compare` gives intervals."
        )
        text += [explanation, ""]
    for benchmark in benchmarks:
        text += [f"{benchmark.name}: {benchmark.source}, {benchmark.version}. {' '.join(benchmark.notes)}".rstrip(), ""]
    write_whole(folder / MARKDOWN_FILE, "\n".join(text))
    content = {
        "title": grid.title,
        "baseline": grid.baseline,
        "benchmarks": {item.name: {"source": item.source, "version": item.version} for item in benchmarks},
        "rows": {
            row.name: {
                "seeds": list(row.seeds),
                "scores": {column: vars(cell) for column, cell in cells[row.name].items()},
            }
            for row in grid.rows
        },
    }
    write_whole(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")

    console = Console()
    table = Table(title=grid.title)
    for name in lines[0]:
        table.add_column(name, justify="right" if name else "left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    console.print(f"also in {folder / MARKDOWN_FILE} and {folder / JSON_FILE}", soft_wrap=True, highlight=False)


def _summary(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def _difference(cell: Cell) -> str:
    return "" if cell.difference is None else f"{cell.difference:+.1f} (p {cell.wilcoxon:.3f})"


def _seeds(row: Row) -> str:
    if row.model is not None:
        return "one model"
    return f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown; the first line is its head."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|" + " --- |" * len(lines[0]), *body]
