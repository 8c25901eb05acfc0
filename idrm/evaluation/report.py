"""The results of an evaluation as tables for the terminal, and as evaluation.json and evaluation.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from idrm.evaluation.results import Result, Table
from idrm.run_folder import write_whole

JSON_FILE, MARKDOWN_FILE, OUTCOMES_FOLDER = "evaluation.json", "evaluation.md", "outcomes"

HOW_TO_READ = """\
A *score* is the share of items, in percent, in which the chosen response gets a strictly higher reward than every
rejected one, weighted as the benchmark does; in brackets its {confidence:.0%} interval, prompts drawn again (10,000
times). *Ties* are the share in which it gets the same reward as the best rejected one; they are not won. *Length only*
is what the better of two rules would score that see no text: always the shorter response, or always the longer one, in
the model's tokens. A score below it, or within its interval, may have learnt no more than length."""


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """The tables without their details, the models of a score one below the other."""
    for table in tables:
        models = _models(table)
        shown = TerminalTable(title=escape(table.title), box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("score", "model"):
            shown.add_column(heading, overflow="fold")
        for heading in ("accuracy", "ties", "length only"):
            shown.add_column(heading, justify="right", no_wrap=True)
        for score in table.scores:
            if score.is_detail:
                continue
            for model in models:
                result = table.results[score.name][model]
                name = score.name if model == models[0] else ""
                shown.add_row(escape(name), escape(model), *_cells(result, 1))
            if len(models) > 1:
                shown.add_section()
        console.print(shown)
        for line in (table.version, *table.notes, *_unread(table)):
            console.print(escape(line), highlight=False)
        console.print()


def markdown(tables: Sequence[Table], models: Mapping[str, str], confidence: float) -> str:
    """evaluation.md: every table with its details."""
    parts = ["# Evaluation", "\n".join(f"- {label}: `{name}`" for label, name in models.items())]
    parts.append(HOW_TO_READ.format(confidence=confidence))
    for table in tables:
        labels = _models(table)
        parts.append(f"## {table.title}")
        parts.append("\n".join(f"- {line}" for line in (table.source, table.version, *table.notes, *_unread(table))))
        headings = ["score", "items"]
        for label in labels:
            headings += [label, "ties", "length only"]
        rows = []
        for score in table.scores:
            results = table.results[score.name]
            cells = [cell for label in labels for cell in _cells(results[label], 2)]
            rows.append([score.name, f"{results[labels[0]].items:,}", *cells])
        aligned = ["---", *["---:"] * (len(headings) - 1)]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in (headings, aligned, *rows)))
    return "\n\n".join(parts) + "\n"


def write_files(
    folder: Path, tables: Sequence[Table], models: Mapping[str, str], settings: Mapping[str, Any], confidence: float
) -> None:
    """Writes evaluation.json, then evaluation.md, each whole or not there."""
    content = {
        "models": dict(models),
        "settings": dict(settings),
        "confidence": confidence,
        "tables": [
            {
                "title": table.title,
                "source": table.source,
                "version": table.version,
                "notes": list(table.notes),
                "scores": [
                    {
                        "name": score.name,
                        "is_detail": score.is_detail,
                        "models": {model: result.as_dict() for model, result in table.results[score.name].items()},
                    }
                    for score in table.scores
                ],
            }
            for table in tables
        ],
    }
    write_whole(folder / JSON_FILE, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / MARKDOWN_FILE, markdown(tables, models, confidence))


def _models(table: Table) -> list[str]:
    return list(table.results[table.scores[0].name])


def _cells(result: Result, digits: int) -> list[str]:
    preference, share = result.better_length
    low, high = result.interval
    return [
        f"{100 * result.accuracy:.{digits}f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{100 * result.ties:.{digits}f}",
        f"{100 * share:.{digits}f} ({preference})",
    ]


def _unread(table: Table) -> list[str]:
    most: dict[str, int] = {}
    for results in table.results.values():
        for model, result in results.items():
            most[model] = max(most.get(model, 0), result.unread)
    return [f"{model} cannot read {count:,} items, which count as lost." for model, count in most.items() if count]
