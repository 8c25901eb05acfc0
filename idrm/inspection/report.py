"""The findings as a table for the terminal, and as the files check.json, check.md and check.png."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idrm.inspection.findings import Inspection
from idrm.inspection.measures import BlockMeasures
from idrm.inspection.verdict import verdict
from idrm.run_folder import write_all_whole

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "check.json", "check.md", "check.png"

HOW_TO_READ = """\
A block is numbered from 0, and in brackets from the end. *Crossing* is the share of a row's attention that goes to the
other sequence, its attention being shared out over both; *times uniform* is its ratio to what a uniform map pays there
(1: as a uniform map, 0: nothing crosses), and *responses, times uniform* the same from the rows of a response to the
other response. The other columns share out a row's attention within each sequence, as training does by default.
*Distance* is the loss of a student whose maps are uniform, within the sequences (intra) and between them (inter);
*moved* is the share of the attention that lies elsewhere than in a uniform map. *Row-specific* is the part of this
structure that differs from row to row; the rest is hub keys, to which every row attends whatever it says. *Responses,
row-specific distance* is the loss of the best student whose rows are all alike, between the responses alone. *Distance
to A* is how far two teachers' maps lie apart, intra and inter together.

Whether an encoder is tuned on NLI is shown by its accuracy, with the true premises and with exchanged ones, not by
these columns: near the input, structure is mostly positions and equal tokens, and random weights have a little too.
Compare with the same encoder untuned: what tuning did to a block is what differs from there."""


@dataclass(frozen=True)
class _Column:
    """A column under its name, and under one that leaves room for all columns in a terminal."""

    name: str
    short: str
    cell: Callable[[BlockMeasures], str]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _structure_columns(kind: str) -> list[_Column]:
    return [
        _Column(f"{kind} distance", f"{kind}\ndist.", lambda block: _number(getattr(block, kind).distance)),
        _Column(f"{kind} moved", f"{kind}\nmoved", lambda block: f"{getattr(block, kind).moved:.0%}"),
        _Column(
            f"{kind} row-specific",
            f"{kind}\nrow-\nspec.",
            lambda block: f"{getattr(block, kind).row_specific_share:.0%}",
        ),
    ]


_COLUMNS = [
    _Column("crossing", "cross-\ning", lambda block: f"{block.crossing.share:.0%}"),
    _Column("times uniform", "times\nunif.", lambda block: _number(block.crossing.ratio)),
    *_structure_columns("intra"),
    *_structure_columns("inter"),
    _Column("responses, times uniform", "resp.\ntimes\nunif.", lambda block: _number(block.response_crossing.ratio)),
    _Column(
        "responses, row-specific distance",
        "resp.\nrow-\nspec.",
        lambda block: _number(block.responses.row_specific_distance),
    ),
]
_COMPARISON = _Column("distance to A", "dist.\nto A", lambda block: _number(block.distance_to_first))


def print_table(inspection: Inspection, console: Console) -> None:
    """The table and the verdict, for a terminal of 80 columns or more."""
    headings, rows = _cells(inspection, short=True)
    table = Table(title="Attention maps, block by block", box=box.SIMPLE_HEAD, padding=0)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, following in itertools.zip_longest(rows, rows[1:]):
        table.add_row(*row, end_section=len(inspection.teachers) > 1 and following is not None and following[1] == "A")
    console.print()
    console.print(table)
    for line in _legend(inspection):
        console.print(escape(line), highlight=False)
    for sentence in verdict(inspection):
        console.print(escape(f"- {sentence}"), highlight=False)


def markdown(inspection: Inspection) -> str:
    """check.md: the table, what it says, and how to read it."""
    headings, rows = _cells(inspection, short=False)
    table = "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---:"] * len(headings), *rows))
    legend, sentences = (
        "\n".join(f"- {line}" for line in lines) for lines in (_legend(inspection), verdict(inspection))
    )
    return (
        f"# Attention maps, block by block\n\n{legend}\n\n{table}\n\n{sentences}\n\n{HOW_TO_READ}\n\n"
        f"![heat map]({PICTURE_FILE})\n"
    )


def write_files(folder: Path, inspection: Inspection, picture: bytes) -> list[Path]:
    """Writes the three files by `write_all_whole`; InputError where it cannot."""
    contents: Mapping[str, bytes] = {
        JSON_FILE: json.dumps(
            {"verdict": verdict(inspection), **inspection.as_dict()}, indent=2, ensure_ascii=False, allow_nan=False
        ).encode(),
        MARKDOWN_FILE: markdown(inspection).encode(),
        PICTURE_FILE: picture,
    }
    return write_all_whole(folder, contents)


def _legend(inspection: Inspection) -> list[str]:
    several = len(inspection.teachers) > 1
    lines = []
    for index, teacher in enumerate(inspection.teachers):
        name = f"{inspection.letter(index)} = {teacher.name}" if several else teacher.name
        lines.append(f"{name}: {teacher.pairs.summary()}")
    if inspection.interaction_rows == "response":
        lines.append("rows of the responses only, as interaction_rows response trains")
    return lines


def _cells(inspection: Inspection, short: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, blocks at the same distance from the end one below the other."""
    several = len(inspection.teachers) > 1
    columns = [*_COLUMNS, _COMPARISON] if several else _COLUMNS
    blocks = sorted(
        (teacher.from_end(layer), index, layer)
        for index, teacher in enumerate(inspection.teachers)
        for layer in teacher.blocks
    )
    rows = []
    for _, index, layer in blocks:
        teacher = inspection.teachers[index]
        cells = [column.cell(teacher.blocks[layer]) for column in columns]
        rows.append([teacher.label(layer), *([inspection.letter(index)] if several else []), *cells])
    headings = [column.short if short else column.name for column in columns]
    return ["block", *(["" if short else "teacher"] if several else []), *headings], rows
