"""The study's table, as Markdown and on the terminal, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from idrm.evaluation.statistics import Interval
from idrm.run_folder import write_whole
from idrm.study.findings import Difference, RowFindings

MARKDOWN_FILE, JSON_FILE = "study.md", "study.json"
_COLUMNS = (
    "row",
    "seeds",
    "accuracy",
    "95% interval",
    "lowest to highest seed",
    "difference",
    "95% (prompts)",
    "95% (prompts, seeds)",
    "Wilcoxon p",
    "better : worse",
    "McNemar p of each seed",
    "prefers the shorter",
    "ties",
    "interaction ratio",
)


def write_report(
    folder: Path, title: str, rows: Sequence[RowFindings], length_accuracy: float, origin: dict[str, Any]
) -> None:
    """Writes study.md and study.json into the folder, and prints the table.

    Args:
        rows: findings, in the order of the table.
        length_accuracy: of one who knows lengths alone.
        origin: what was measured with which versions; for the JSON file, and the line below the table.
    """
    cells = [_cells(row) for row in rows]
    pairs = rows[0].pairs
    cells.append(["length alone", "", f"{length_accuracy:.1%}", *[""] * (len(_COLUMNS) - 3)])
    lines = [f"# {title}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *map(_line, cells), ""]
    explanation = (
        f"{pairs:,} pairs, each tested by runs that were trained on the other folds. Differences are from the row "
        "without one, over the seeds that both have. Their first interval draws prompts again for these very runs, the "
        "second one seeds as well. Wilcoxon's signed ranks are over the accuracies of every fold and seed, and "
        "better : worse counts those."
    )
    versions = "; ".join(f"{name}: {value}" for name, value in origin.items())
    write_whole(folder / MARKDOWN_FILE, "\n".join([*lines, explanation, "", versions]) + "\n")
    content = {
        "title": title,
        "origin": origin,
        "length_accuracy": length_accuracy,
        "rows": [{**dataclasses.asdict(row), "accuracy": row.accuracy} for row in rows],
    }
    write_whole(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")

    console = Console()
    table = Table(title=title)
    for column in _COLUMNS[:7]:
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in cells:
        table.add_row(*row[:7])
    console.print(table)
    console.print(f"all columns: {folder / MARKDOWN_FILE}, {folder / JSON_FILE}", soft_wrap=True, highlight=False)


def _cells(row: RowFindings) -> list[str]:
    return [
        row.name,
        str(len(row.accuracies)),
        f"{row.accuracy:.1%}",
        _interval(row.interval, "{:.1%}"),
        f"{min(row.accuracies):.1%} to {max(row.accuracies):.1%}",
        *_difference_cells(row.difference),
        f"{row.prefers_shorter:.0%}",
        f"{row.ties:.1%}",
        "" if row.interaction_ratio is None else f"{row.interaction_ratio:.3f}",
    ]


def _difference_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return [""] * 6
    return [
        f"{difference.mean:+.1%}",
        _interval(difference.interval, "{:+.1%}"),
        "" if difference.interval_over_runs is None else _interval(difference.interval_over_runs, "{:+.1%}"),
        f"{difference.wilcoxon:.3f}",
        f"{difference.row_better} : {difference.baseline_better}",
        ", ".join(f"{p:.2f}" for p in difference.mcnemar),
    ]


def _interval(interval: Interval, form: str) -> str:
    return f"{form.format(interval.low)} to {form.format(interval.high)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
