"""`idrm compare`: whether two models differ on the same items, from what `idrm eval` left."""

from __future__ import annotations

import itertools
import json
import logging
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idrm.errors import InputError
from idrm.evaluation.command import Parser
from idrm.evaluation.comparison import Comparison, Side, compare, read_side
from idrm.evaluation.statistics import smallest_wilcoxon
from idrm.processes import command
from idrm.run_folder import require_writable, write_whole

logger = logging.getLogger("idrm.evaluation")

DEFAULT_FOLDER = "idrm-compare"
JSON_FILE, MARKDOWN_FILE = "comparison.json", "comparison.md"
DESCRIPTION = """\
Compares two models, or two ways to train one with several seeds each, on the items of `idrm eval`.

  idrm compare results/outcomes/a results/outcomes/b
  idrm compare --first seeds/a0 seeds/a1 seeds/a2 --second seeds/b0 seeds/b1 seeds/b2

A side is an outcomes file or a folder of them, one for each seed; seeds are paired in order. docs/evaluation.md
defines what is reported.
"""
HOW_TO_READ = """\
*Difference* is the accuracy of A less that of B, in points of a percent, mean over runs; in brackets its
{confidence:.0%} interval, prompts drawn again for these very runs. *With seeds* draws the runs again as well, which
says what other seeds might give. *McNemar* is the exact p-value from the items that one of both alone decides rightly,
for every pair of runs. *Wilcoxon* is the p-value of the signed-rank test over the runs' or the subsets' accuracies; of
n pairs it is at least 2 / 2^n, so that five seeds cannot reach 5%."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        run(make_parser().parse_args(argv))


def run(arguments: Namespace) -> None:
    """Reads both sides, compares, prints, writes.

    Raises:
        InputError: anything the user can put right; nothing has been written then.
    """
    runs = _runs_of_sides(arguments)
    if not 0 < arguments.confidence < 1:
        raise InputError(f"--confidence: expected a share between 0 and 1, got {arguments.confidence}")
    folder = Path(arguments.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder")
    require_writable("--output_dir", folder)
    first, second = (
        read_side(paths, name) for paths, name in zip(runs, (arguments.first_name, arguments.second_name), strict=True)
    )
    comparisons = compare(first, second, confidence=arguments.confidence)
    read = [one for side in (first, second) for several in side.outcomes.values() for one in several]
    for setting in ("max_length", "dtype"):
        values = {str(one.origin.get(setting)) for one in read}
        if len(values) > 1:
            logger.warning("These outcomes were scored with different %s: %s.", setting, ", ".join(sorted(values)))
    left_out = sorted(first.outcomes.keys() ^ second.outcomes.keys())
    if left_out:
        logger.info("Only one side was measured on %s: left out.", ", ".join(left_out))
    write_files(folder, first, second, comparisons, arguments.confidence)
    print_tables(first, second, comparisons, Console())
    logger.info("%s and %s are in %s", JSON_FILE, MARKDOWN_FILE, folder)


def print_tables(first: Side, second: Side, comparisons: Sequence[Comparison], console: Console) -> None:
    """A table for each benchmark, with McNemar's test for one run and Wilcoxon's for several."""
    several = comparisons[0].seeds > 1
    console.print(escape(f"A = {first.label}, B = {second.label}"), highlight=False)
    for benchmark, group in itertools.groupby(comparisons, key=lambda comparison: comparison.benchmark):
        table = Table(title=escape(benchmark), box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("score")
        for heading in ("A", "B", "A - B", "p, seeds" if several else "McNemar", "p, subsets"):
            table.add_column(heading, justify="right", no_wrap=heading in ("A", "B", "A - B"))
        for comparison in group:
            p_value = comparison.wilcoxon_over_seeds if several else comparison.mcnemar[0]
            table.add_row(
                escape(comparison.score), *_cells(comparison, 1), _p(p_value), _p(comparison.wilcoxon_over_subsets)
            )
        console.print(table)
    for line in _remarks(comparisons):
        console.print(escape(line), highlight=False)


def markdown(first: Side, second: Side, comparisons: Sequence[Comparison], confidence: float) -> str:
    """comparison.md."""
    headings = ["benchmark", "score", "items", "A", "B", "A - B", "with seeds", "McNemar", "Wilcoxon, seeds"]
    headings.append("Wilcoxon, subsets")
    rows = []
    for one in comparisons:
        seeds = "-" if one.interval_over_seeds is None else _interval(one.interval_over_seeds, 2)
        p_values = [", ".join(map(_p, one.mcnemar)), _p(one.wilcoxon_over_seeds), _p(one.wilcoxon_over_subsets)]
        rows.append([one.benchmark, one.score, f"{one.items:,}", *_cells(one, 2), seeds, *p_values])
    aligned = ["---", "---", *["---:"] * (len(headings) - 2)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (headings, aligned, *rows))
    sides = "\n".join(
        f"- {letter} = {side.label}: {', '.join(f'`{run}`' for run in side.runs)}"
        for letter, side in (("A", first), ("B", second))
    )
    remarks = "\n".join(f"- {line}" for line in _remarks(comparisons))
    parts = ["# Comparison", sides, table, remarks, HOW_TO_READ.format(confidence=confidence)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_files(folder: Path, first: Side, second: Side, comparisons: Sequence[Comparison], confidence: float) -> None:
    """Writes comparison.json, then comparison.md, each whole or not there."""
    content = {
        "first": {"label": first.label, "runs": list(first.runs)},
        "second": {"label": second.label, "runs": list(second.runs)},
        "confidence": confidence,
        "comparisons": [comparison.as_dict() for comparison in comparisons],
    }
    write_whole(folder / JSON_FILE, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / MARKDOWN_FILE, markdown(first, second, comparisons, confidence))


def _cells(comparison: Comparison, digits: int) -> list[str]:
    a, b = (100 * sum(side) / len(side) for side in (comparison.first, comparison.second))
    difference = f"{100 * comparison.difference:+.{digits}f} {_interval(comparison.interval, digits)}"
    return [f"{a:.{digits}f}", f"{b:.{digits}f}", difference]


def _interval(interval: Sequence[float], digits: int) -> str:
    low, high = interval
    return f"[{100 * low:+.{digits}f}, {100 * high:+.{digits}f}]"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _remarks(comparisons: Sequence[Comparison]) -> list[str]:
    seeds = comparisons[0].seeds
    if seeds == 1 or smallest_wilcoxon(seeds) <= 0.05:
        return []
    return [f"Of {seeds} seeds, Wilcoxon's p-value cannot be below {smallest_wilcoxon(seeds):g}: 5% takes six."]


def _runs_of_sides(arguments: Namespace) -> tuple[list[str], list[str]]:
    """The runs of both sides, given as two positions or as two flags."""
    positions, flags = arguments.sides, (arguments.first, arguments.second)
    if len(positions) == 2 and flags == (None, None):
        return [positions[0]], [positions[1]]
    if positions or None in flags:
        raise InputError("expected two sides, as A B, or as --first A0 [A1 ...] --second B0 [B1 ...]")
    return flags


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="idrm compare",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sides", nargs="*", metavar="A B", help="Two outcomes files, or two folders of them.")
    add("--first", nargs="+", metavar="A", help="The first side: an outcomes file or folder for each seed.")
    add("--second", nargs="+", metavar="B", help="The second side, seeds in the same order.")
    add("--first_name", help="Label of the first side. Default: its models'.")
    add("--second_name", help="Label of the second side.")
    add("--output_dir", default=DEFAULT_FOLDER, help="Where results go. Default: %(default)s.")
    add("--confidence", type=float, default=0.95, help="Of the intervals. Default: %(default)s.")
    return parser
