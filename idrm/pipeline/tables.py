"""The tables of a pipeline: those of its grids, and win rates from what its judge steps left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from idrm.grid.table import JSON_FILE as GRID_JSON
from idrm.grid.table import MARKDOWN_FILE as GRID_MARKDOWN
from idrm.grid.table import markdown_table
from idrm.judging.report import JSON_FILE as JUDGE_JSON
from idrm.pipeline.specification import Pipeline, Table
from idrm.run_folder import write_whole

MARKDOWN_FILE, JSON_FILE = "tables.md", "tables.json"


def write_tables(folder: Path, pipeline: Pipeline) -> None:
    """Writes tables.md and tables.json from what all steps left, and prints the tables."""
    outputs = {step.name: folder / step.location for step in pipeline.steps}
    written = [_table(table, outputs) for table in pipeline.tables]
    text = [f"# {pipeline.title}", ""]
    for _, title, lines in written:
        text += [f"## {title}", "", *([f"**{pipeline.note}**", ""] if pipeline.note else []), *lines, ""]
    write_whole(folder / MARKDOWN_FILE, "\n".join(text))
    content = {"title": pipeline.title, "note": pipeline.note, "tables": [numbers for numbers, _, _ in written]}
    write_whole(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
    console = Console()
    console.print(Markdown("\n".join(text)))
    console.print(f"also in {folder / MARKDOWN_FILE} and {folder / JSON_FILE}", soft_wrap=True, highlight=False)


def _table(table: Table, outputs: dict[str, Path]) -> tuple[dict[str, Any], str, Sequence[str]]:
    """Its numbers, title and lines of Markdown."""
    if table.grid is not None:
        folder = outputs[table.grid]
        numbers = json.loads((folder / GRID_JSON).read_text(encoding="utf-8"))
        # Its title is the first line; what is below it stands a level lower here.
        lines = (folder / GRID_MARKDOWN).read_text(encoding="utf-8").strip().split("\n")[2:]
        return numbers, numbers["title"], [f"#{line}" if line.startswith("#") else line for line in lines]
    rows = {
        name: json.loads((outputs[step] / JUDGE_JSON).read_text(encoding="utf-8"))
        for name, step in table.judged.items()
    }
    lines = [["against", "win", "tie", "lose", "unparseable", "win rate", "95% interval"]]
    for name, result in rows.items():
        counts = [f"{100 * result[key] / result['pairs']:.1f}" for key in ("wins", "ties", "loses", "unparseable")]
        interval = result["interval"]
        rate = "-" if result["win_rate"] is None else f"{100 * result['win_rate']:.1f}"
        bounds = "-" if interval is None else " to ".join(f"{100 * bound:.1f}" for bound in interval)
        lines.append([f"{name} ({result['pairs']:,} prompts)", *counts, rate, bounds])
    judges = sorted({result["judge"] for result in rows.values()})
    explanation = f"Percent; the win rate is win / (win + lose). Judged in both orders by {', '.join(judges)}."
    return {"title": table.title, "rows": rows}, str(table.title), [*markdown_table(lines), "", explanation]
