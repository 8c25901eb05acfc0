"""`idrm average`: one reward model whose weights are the mean of those of several runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from idrm.command_line import FlagParser
from idrm.ensembles.averaging import Spread, write_average
from idrm.ensembles.sameness import require_averageable
from idrm.errors import InputError
from idrm.evaluation.batching import progress_bar
from idrm.processes import command
from idrm.run_folder import require_writable

logger = logging.getLogger("idrm.ensembles")

# Two runs of independent weights have 1, three trained runs of a tiny model had 0.03.
SUSPICIOUS_SPREAD = 0.5


@dataclass
class AverageArguments:
    """Where the mean goes."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the model, which is not there yet or empty."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        average(*parse_arguments(argv))


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[list[str], Path]:
    """The folders of the runs, and that of the result; InputError where one of them is missing."""
    parser = FlagParser((AverageArguments,), "idrm average")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Output folder of a training run: its saved model.")
    values, _ = parser.values(argv)
    if not values["runs"]:
        raise InputError("expected the folders of runs, idrm average RUN RUN ... --output_dir OUT, got none")
    if not values["output_dir"]:
        raise InputError("--output_dir is missing: give a folder for the model")
    return values["runs"], Path(values["output_dir"]).expanduser().resolve()


def average(folders: Sequence[str], output_dir: Path) -> Spread:
    """Writes the mean of the runs' weights as a model of its own.

    Raises:
        InputError: anything the user can put right; nothing has been written then.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: is not empty; give a folder that is, or that is not there yet")
    require_writable("--output_dir", output_dir.parent)
    runs, tokenizer = require_averageable(folders)
    numbers = sum(math.prod(entry.shape) for entry in runs[0].checkpoint.tensors.values())
    with progress_bar(True) as progress:
        task = progress.add_task(f"Averaging {len(runs)} runs", total=numbers)
        spread = write_average(runs, tokenizer, output_dir, lambda done: progress.advance(task, done))
    logger.info(
        "Distance of the runs from their mean, as a share of its size: %.4f; at most %.4f, of %s.",
        spread.overall,
        spread.widest,
        spread.widest_name,
    )
    if spread.widest >= SUSPICIOUS_SPREAD:
        logger.warning(
            "%s differs between the runs by %.0f%% of its size: they hardly began from the same weights, and their "
            "mean may be worth nothing. Compare it with the runs by idrm eval.",
            spread.widest_name,
            100 * spread.widest,
        )
    logger.info("The mean of %d runs, %s weights, is in %s", len(runs), f"{numbers:,}", output_dir)
    return spread
