"""`idrm analyze`: the analyses of the paper's figures, each written as CSV and PNG, all files or none.

idrm analyze attention MODEL --dataset_name PAIRS [flags]
idrm analyze interaction MODEL [--prompt TEXT --chosen TEXT --rejected TEXT] [flags]
idrm analyze sensitivity RESULTS [RESULTS ...] [flags]
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from idrm.analysis.interaction_scores import EXAMPLE, interaction_scores
from idrm.analysis.page import scores_page
from idrm.analysis.pictures import draw_scores, draw_sensitivity, draw_stages
from idrm.analysis.sensitivity import find_runs, other_differences, sweep
from idrm.analysis.stages import DEFAULT_PAIRS_IN_A_BATCH, STAGES, attention_by_stage
from idrm.analysis.tables import csv_bytes, masked_accuracy_rows, point_rows, run_rows, score_rows, stage_rows
from idrm.errors import InputError
from idrm.evaluation.catalogue import BenchmarkSource
from idrm.evaluation.command import Parser
from idrm.evaluation.evaluation import Scoring, device_of, require_scorable
from idrm.evaluation.reading import DTYPES
from idrm.evaluation.reward_model import RewardModel, load_reward_model
from idrm.preference import WITHOUT_MARGINS, load_preferences
from idrm.preference.formats import convert_record, drop_reason
from idrm.processes import command
from idrm.run_folder import require_writable, write_all_whole

logger = logging.getLogger("idrm.analysis")

DEFAULT_FOLDERS = {name: f"idrm-{name}" for name in ("attention", "interaction", "sensitivity")}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the analysis that the command line asks for; bad input is one line on stderr and exit status 2."""
    with command():
        arguments = _parser().parse_args(argv)
        folder = Path(arguments.output_dir).expanduser()
        require_writable("--output_dir", folder)
        files = write_all_whole(folder, arguments.analyse(arguments))
        logger.info("Written: %s", ", ".join(map(str, files)))


def _attention(arguments: Namespace) -> dict[str, bytes]:
    scoring = _scoring(arguments)
    if arguments.max_pairs is not None and arguments.max_pairs < 1:
        raise InputError(f"--max_pairs: expected at least 1, got {arguments.max_pairs}")
    download = BenchmarkSource("pairs", arguments.dataset_name).download
    if download is not None:
        logger.info("%s: downloads from the Hugging Face hub, unless it is on this machine already.", download)
    pairs, report = load_preferences(arguments.dataset_name, split=arguments.dataset_split, columns=WITHOUT_MARGINS)
    logger.info(report.summary())
    if arguments.max_pairs is not None:
        number = min(arguments.max_pairs, len(pairs))
        pairs = pairs.select([place * len(pairs) // number for place in range(number)])
    analysis = attention_by_stage(
        _reward_model(arguments, scoring),
        pairs,
        layer=arguments.layer,
        stages=arguments.stages,
        batch_size=arguments.batch_size,
    )
    stages, masked = stage_rows(analysis), masked_accuracy_rows(analysis)
    logger.info(
        "%s pairs, %s of them decided rightly; attention of layer %d; left out: %s",
        f"{len(analysis.prompts):,}",
        f"{analysis.won[0].sum():,}",
        analysis.layer,
        ", ".join(f"{count:,} {reason}" for reason, count in analysis.dropped.items()) or "none",
    )
    _print_stages(stages, masked)
    return {
        "attention.csv": csv_bytes(stages),
        "masked_accuracy.csv": csv_bytes(masked),
        "attention.png": draw_stages(stages, masked),
    }


def _print_stages(stages: Sequence[dict[str, Any]], masked: Sequence[dict[str, Any]]) -> None:
    """One line a stage: its share of the attention in the four groups, and the accuracy with all before it masked."""
    groups = list(dict.fromkeys((row["decision"], row["sequence"]) for row in stages))
    shares = {(row["decision"], row["sequence"], row["stage"]): row["share"] for row in stages}
    table = Table(title="Share of the pooled token's attention to content, and accuracy without what comes before")
    for heading in ("stage", *(f"{decision}, {sequence}" for decision, sequence in groups), "accuracy"):
        table.add_column(heading, justify="right")
    for stage, row in enumerate(masked, start=1):
        cells = [f"{shares[(*group, stage)]:.1%}" for group in groups]
        table.add_row(str(stage), *cells, f"{row['accuracy']:.1%}")
    Console().print(table)


def _interaction(arguments: Namespace) -> dict[str, bytes]:
    pair, scoring = _pair(arguments), _scoring(arguments)
    scores = interaction_scores(
        _reward_model(arguments, scoring), pair, layer=arguments.layer, queries=arguments.queries, part=arguments.part
    )
    by_name = {side.name: side.reward for side in (scores.rows, scores.columns)}
    logger.info("Rewards: chosen %.4f, rejected %.4f", by_name["chosen"], by_name["rejected"])
    title = f"Interaction of chosen and rejected by {arguments.model}"
    return {
        "interaction.csv": csv_bytes(score_rows(scores)),
        "interaction.png": draw_scores(scores),
        "interaction.html": scores_page(scores, title).encode(errors="replace"),
    }


def _pair(arguments: Namespace) -> dict[str, Any]:
    """The pair that the flags describe, or the example."""
    given = {name: value for name in EXAMPLE if (value := getattr(arguments, name)) is not None}
    if not given:
        given = EXAMPLE
    elif not {"chosen", "rejected"} <= given.keys():
        raise InputError("expected both --chosen and --rejected (and --prompt where there is one), or none of them")
    record: dict[str, Any] = dict(given)
    if "prompt" in given:
        # Messages, so that a model without a chat template reads the role headers that dialogues have.
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        record = {name: [{"role": role, "content": given[name]}] for name, role in roles.items()}
    pair = convert_record(record, WITHOUT_MARGINS)
    reason = drop_reason(pair)
    if reason:
        raise InputError(f"--chosen, --rejected: {reason.replace('_', ' ')}")
    return pair


def _sensitivity(arguments: Namespace) -> dict[str, bytes]:
    runs = find_runs(arguments.results, metric=arguments.metric)
    points = sweep(runs)
    differing = other_differences(runs)
    if differing:
        logger.warning("The runs also differ in %s, which the figure does not show.", ", ".join(differing))
    table = Table(title=f"Accuracy of {len(runs)} runs")
    for heading in ("alpha", "m", "seeds", "mean", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for point in points:
        blocks = "-" if point.top_blocks is None else str(point.top_blocks)
        numbers = [f"{value:.4f}" for value in (point.mean, point.lowest, point.highest)]
        table.add_row(f"{point.alpha:g}", blocks, str(point.seeds), *numbers)
    Console().print(table)
    return {
        "sensitivity.csv": csv_bytes(point_rows(points)),
        "runs.csv": csv_bytes(run_rows(runs)),
        "sensitivity.png": draw_sensitivity(points),
    }


def _scoring(arguments: Namespace) -> Scoring:
    """How the model is loaded, once it is clear that it can be: nothing of its weights is loaded yet."""
    scoring = Scoring(
        dtype=arguments.dtype,
        device=arguments.device,
        max_length=arguments.max_length,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    require_scorable(arguments.model, scoring)
    return scoring


def _reward_model(arguments: Namespace, scoring: Scoring) -> RewardModel:
    return load_reward_model(
        arguments.model,
        dtype=scoring.dtype,
        device=device_of(scoring),
        max_length=scoring.max_length,
        attn_implementation=scoring.attn_implementation,
        share_prompt="off",
        trust_remote_code=scoring.trust_remote_code,
    )


def _parser() -> ArgumentParser:
    parser = Parser(prog="idrm analyze", description="The analyses of the paper's figures 1, 2 and 5.")
    analyses = parser.add_subparsers(dest="analysis", required=True, parser_class=Parser, metavar="ANALYSIS")

    attention = _add(
        analyses, "attention", _attention, "Figure 1: where the pooled token looks, and accuracy with the front masked."
    )
    attention.add_argument("model", metavar="MODEL", help="Reward model: a folder, or a name on the hub.")
    attention.add_argument("--dataset_name", required=True, help="Pairs, as `idrm train --dataset_name` takes them.")
    attention.add_argument("--dataset_split", default="test", help="Split of them (default: test).")
    attention.add_argument("--max_pairs", type=int, help="At most so many, at even distances (default: all).")
    attention.add_argument("--stages", type=int, default=STAGES, help=f"Stages of the content (default: {STAGES}).")
    attention.add_argument(
        "--batch_size",
        type=int,
        default=DEFAULT_PAIRS_IN_A_BATCH,
        help=f"Pairs in a batch (default: {DEFAULT_PAIRS_IN_A_BATCH}).",
    )
    _add_model_flags(attention)

    interaction = _add(
        analyses, "interaction", _interaction, "Figure 2: query.key between the tokens of chosen and of rejected."
    )
    interaction.add_argument("model", metavar="MODEL", help="Reward model: a folder, or a name on the hub.")
    for name, example in EXAMPLE.items():
        interaction.add_argument(f"--{name}", metavar="TEXT", help=f"Default, with the two others: {example!r}.")
    interaction.add_argument(
        "--queries",
        choices=("chosen", "rejected"),
        default="chosen",
        help="The sequence whose queries meet the other's keys (default: chosen).",
    )
    interaction.add_argument(
        "--part", choices=("all", "response"), default="all", help="All content, or the responses (default: all)."
    )
    _add_model_flags(interaction)

    sensitivity = _add(
        analyses, "sensitivity", _sensitivity, "Figure 5: accuracy over alpha and over m, the number of top blocks."
    )
    sensitivity.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="Folders of runs, or folders above them, or outcomes files of `idrm eval`.",
    )
    sensitivity.add_argument(
        "--metric", help="Accuracy in all_results.json, such as eval_hh_accuracy (default: the only one there)."
    )
    return parser


def _add(analyses, name: str, analyse, description: str) -> ArgumentParser:
    parser = analyses.add_parser(name, help=description, description=description, allow_abbrev=False)
    parser.set_defaults(analyse=analyse)
    folder = DEFAULT_FOLDERS[name]
    parser.add_argument("--output_dir", default=folder, help=f"Folder that receives the files (default: {folder}).")
    return parser


def _add_model_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--layer", type=int, default=-1, help="Block, negative from the end (default: -1, the last).")
    parser.add_argument("--max_length", type=int, help="Most tokens of a sequence; longer ones are cut as in training.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of the model (default: float32).")
    parser.add_argument("--attn_implementation", help="Attention backend (default: transformers' choice).")
    parser.add_argument("--device", help="Such as cuda:1 or cpu (default: the accelerator, or else the CPU).")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that the model brings along.")
