"""`idrm margins`: preference pairs with the margins of several reward models beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idrm.command_line import FlagParser, fields_of, require_at_least
from idrm.ensembles.margins import (
    FLIPPED_SHARE,
    Margins,
    require_new_columns,
    score_margins,
    write_with_margins,
)
from idrm.errors import InputError
from idrm.evaluation.batching import DEFAULT_BATCH_SIZE
from idrm.evaluation.command import labelled_models
from idrm.evaluation.evaluation import Scoring, require_scorable
from idrm.processes import command
from idrm.run_folder import require_writable
from idrm.sources import load_records

logger = logging.getLogger("idrm.ensembles")

QUANTILES = (0.05, 0.1, FLIPPED_SHARE, 0.5, 0.8, 0.9, 0.95)


@dataclass
class MarginArguments:
    """The pairs, where they go, and how models are scored."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference pairs, of any source and format that training takes: hub name, file or folder."},
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines (.jsonl): every record, with the columns margin_mean and margin_deviation."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_file where it is there already."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sequence in tokens; what is longer loses its beginning. Default: 2048, or a model's own "
            "limit where that is lower."
        },
    )
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, metadata={"help": "Most sequences in a batch."})
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens in a batch, padding included. Default: any."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights: float32, bfloat16, float16, float64 or auto, as saved."},
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda:1 or cpu. Default: the accelerator, else the CPU."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2. Default: transformers' choice."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the models' repositories run their own code here."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        run(*parse_arguments(argv))


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[dict[str, str], MarginArguments]:
    """The models by their labels, and the flags.

    Raises:
        InputError: an unknown flag, a value of the wrong kind, no model, or one that is given twice.
    """
    parser = FlagParser((MarginArguments,), "idrm margins")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="Folder or hub name of a reward model, or label=it.")
    values, _ = parser.values(argv)
    if not values["models"]:
        raise InputError("expected reward models, idrm margins MODEL MODEL ... --dataset_name PAIRS, got none")
    for flag, meaning in (("dataset_name", "the pairs"), ("output_file", "a .jsonl file to write")):
        if not values[flag]:
            raise InputError(f"--{flag} is missing: give {meaning}")
    require_at_least(values, {"batch_size": 1, "tokens_per_batch": 1, "max_length": 8})
    return labelled_models(values["models"]), MarginArguments(**fields_of(MarginArguments, values))


def run(models: dict[str, str], arguments: MarginArguments) -> Margins:
    """Scores all pairs with all models, writes the file and prints the summary.

    Raises:
        InputError: anything the user can put right; nothing has been written then.
    """
    path = Path(arguments.output_file).expanduser()
    if path.suffix != ".jsonl":
        raise InputError(f"--output_file {path}: expected a name that ends with .jsonl")
    source = Path(arguments.dataset_name).expanduser()
    if path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"--output_file {path}: is --dataset_name; give another file")
    if path.is_dir() or (path.exists() and not arguments.overwrite):
        raise InputError(f"--output_file {path}: is there already; give another name, or --overwrite true")
    require_writable("--output_file", path.parent)
    scoring = Scoring(
        dtype=arguments.dtype,
        device=arguments.device,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        tokens_per_batch=arguments.tokens_per_batch,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    # Before the pairs are read, which may take minutes.
    for name in models.values():
        require_scorable(name, scoring)
    records = load_records(arguments.dataset_name, split=arguments.dataset_split)
    require_new_columns(records.column_names, arguments.dataset_name)
    margins = score_margins(records, arguments.dataset_name, models, scoring)
    write_with_margins(path, records, margins)
    print_summary(margins, Console())
    logger.info("%s: %s pairs with the margins of %d models", path, f"{len(records):,}", len(models))
    return margins


def print_summary(margins: Margins, console: Console) -> None:
    """What each model says, and what they say together."""
    models = Table(title="Margins by model", box=box.SIMPLE_HEAD, pad_edge=False)
    models.add_column("model", overflow="fold")
    for heading in ("chosen is better", "mean margin", "deviation over pairs"):
        models.add_column(heading, justify="right")
    for label, values in zip(margins.models, margins.by_model[:, margins.scored], strict=True):
        models.add_row(escape(label), f"{(values > 0).mean():.1%}", f"{values.mean():.4f}", f"{values.std():.4f}")
    console.print(models)
    together = Table(title="Mean margin of all models", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    together.add_column(overflow="fold")
    together.add_column(justify="right", no_wrap=True)
    together.add_row(
        "pairs below 0: together, the models prefer the rejected response", f"{margins.share_negative:.1%}"
    )
    for share, value in zip(QUANTILES, margins.quantiles(QUANTILES), strict=True):
        flipped = ": what label flipping flips" if share == FLIPPED_SHARE else ""
        together.add_row(f"the lowest {share:.0%} lie below{flipped}", f"{value:.4f}")
    together.add_row("mean deviation between the models", f"{margins.deviation[margins.scored].mean():.4f}")
    together.add_row("two models prefer the same response", f"{margins.agreement:.1%}")
    together.add_row("all models prefer the same response", f"{margins.share_unanimous:.1%}")
    console.print(together)
    unscored = int((~margins.scored).sum())
    if unscored:
        console.print(
            f"Without a margin (null): {unscored:,}, where a response is empty or a model's chat template refuses it.",
            highlight=False,
        )
