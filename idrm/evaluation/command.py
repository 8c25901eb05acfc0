"""`idrm eval`: reward models on benchmarks, side by side."""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from idrm.errors import InputError
from idrm.evaluation.batching import DEFAULT_BATCH_SIZE
from idrm.evaluation.catalogue import DEFAULT_SPLIT, benchmark_sources, load_benchmark
from idrm.evaluation.evaluation import Scoring, evaluate_models, require_scorable
from idrm.evaluation.implicit_reward import DEFAULT_BETA
from idrm.evaluation.outcomes import Outcomes, write_outcomes
from idrm.evaluation.reading import DTYPES
from idrm.evaluation.report import JSON_FILE, MARKDOWN_FILE, OUTCOMES_FOLDER, print_tables, write_files
from idrm.evaluation.results import tables_of
from idrm.processes import command
from idrm.run_folder import require_writable

logger = logging.getLogger("idrm.evaluation")

DEFAULT_FOLDER = "idrm-eval"
DESCRIPTION = """\
Scores reward models on benchmarks and writes one table, one JSON file and the outcome of every item, which
`idrm compare` reads. docs/evaluation.md defines what is measured.

  idrm eval my-model other=some/folder --benchmark rewardbench hh=pairs.jsonl --output_dir results
"""


class Parser(ArgumentParser):
    """Raises InputError where argparse prints its usage."""

    def error(self, message: str):
        raise InputError(message)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        evaluate(make_parser().parse_args(argv))


def evaluate(arguments: Namespace) -> None:
    """Checks all models and benchmarks, scores, writes.

    Raises:
        InputError: anything the user can put right; nothing has been scored or written then, unless a model cannot be
            loaded whose files looked whole.
    """
    models = labelled_models(arguments.models)
    scoring = _scoring(arguments)
    confidence = arguments.confidence
    if not 0 < confidence < 1:
        raise InputError(f"--confidence: expected a share between 0 and 1, got {confidence}")
    sources = benchmark_sources(arguments.benchmark)
    folder = Path(arguments.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder")
    require_writable("--output_dir", folder)
    if not arguments.overwrite and ((folder / JSON_FILE).exists() or (folder / OUTCOMES_FOLDER).exists()):
        raise InputError(f"--output_dir {folder}: holds another evaluation; give another folder, or --overwrite")
    for name in models.values():
        require_scorable(name, scoring)
    benchmarks = [load_benchmark(source, split=arguments.split) for source in sources]
    for benchmark in benchmarks:
        logger.info("%s: %s", benchmark.name, benchmark.version)

    # What is left of another evaluation would be compared with this one's.
    for left in [folder / JSON_FILE, folder / MARKDOWN_FILE, *(folder / OUTCOMES_FOLDER).glob("*/*.jsonl")]:
        left.unlink(missing_ok=True)

    def keep(outcomes: Outcomes) -> None:
        write_outcomes(folder / OUTCOMES_FOLDER / outcomes.model / f"{outcomes.benchmark}.jsonl", outcomes)

    outcomes = evaluate_models(models, benchmarks, scoring, on_outcomes=keep, show_progress=not arguments.quiet)
    tables = tables_of(benchmarks, outcomes, confidence)
    write_files(folder, tables, models, asdict(scoring), confidence)
    print_tables(tables, Console())
    logger.info("%s, %s and the outcomes of all items are in %s", JSON_FILE, MARKDOWN_FILE, folder)


def labelled_models(entries: Sequence[str]) -> dict[str, str]:
    """{label: folder or hub name} of entries MODEL or label=MODEL.

    A model without a label is called after its folder, with as many of the folders above it as tell it from the others.

    Raises:
        InputError: a label that is given twice or cannot be a file's name, or a model that is given twice without one.
    """
    given: dict[int, str] = {}
    names: list[str] = []
    for index, entry in enumerate(entries):
        label, separator, name = entry.partition("=")
        if separator and name and not Path(entry).exists():
            if not re.fullmatch(r"[\w.-]+", label) or label in (".", ".."):
                raise InputError(f"{entry}: expected a label of letters, digits, '_', '.' and '-'")
            given[index] = label
            names.append(name)
        else:
            names.append(entry)
    parts = [[part for part in Path(name).absolute().parts if part != "/"] for name in names]
    labels: list[str] = []
    for index, own in enumerate(parts):
        others = [theirs for place, theirs in enumerate(parts) if place != index and place not in given]
        depth = next((n for n in range(1, len(own)) if all(own[-n:] != theirs[-n:] for theirs in others)), len(own))
        labels.append(given.get(index) or re.sub(r"[^\w.-]+", "-", "-".join(own[-depth:])) or "model")
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"several models are called {label!r}: give each a label of its own, as label=model")
    return dict(zip(labels, names, strict=True))


def _scoring(arguments: Namespace) -> Scoring:
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size: expected at least 1, got {arguments.batch_size}")
    if arguments.tokens_per_batch is not None and arguments.tokens_per_batch < 1:
        raise InputError(f"--tokens_per_batch: expected at least 1, got {arguments.tokens_per_batch}")
    if arguments.implicit_reward is not None and arguments.reference_free:
        raise InputError("--reference_free: contradicts the reference that --implicit_reward names")
    is_implicit = arguments.implicit_reward is not None or arguments.reference_free
    if arguments.beta is not None and not is_implicit:
        raise InputError("--beta: is for DPO policies; give --implicit_reward and their reference")
    if arguments.share_prompt == "on" and is_implicit:
        raise InputError("--share_prompt on: a policy reads every sequence by itself; it is for reward models")
    if arguments.share_prompt == "on" and arguments.batch_size == 1:
        raise InputError("--share_prompt on: with --batch_size 1 every sequence is read by itself")
    beta = DEFAULT_BETA if arguments.beta is None else arguments.beta
    if not 0 < beta < float("inf"):
        raise InputError(f"--beta: expected a positive number, got {beta}")
    return Scoring(
        dtype=arguments.dtype,
        device=arguments.device,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        tokens_per_batch=arguments.tokens_per_batch,
        is_implicit=is_implicit,
        reference=arguments.implicit_reward,
        beta=beta,
        attn_implementation=arguments.attn_implementation,
        share_prompt=arguments.share_prompt,
        trust_remote_code=arguments.trust_remote_code,
    )


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="idrm eval",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Folder or hub name of a reward model, or label=MODEL.")
    add(
        "--benchmark",
        nargs="+",
        required=True,
        metavar="BENCHMARK",
        help="rewardbench and rmb (downloaded), rewardbench=PATH, rmb=PATH, or pairs of any format that training "
        "takes, as PAIRS or name=PAIRS: a hub name, file or folder.",
    )
    add("--split", default=DEFAULT_SPLIT, help="Split of pairs from a hub name or folder. Default: %(default)s.")
    add("--output_dir", default=DEFAULT_FOLDER, help="Where results go. Default: %(default)s.")
    add("--overwrite", action="store_true", help="Replace the results of an evaluation that --output_dir holds.")
    add(
        "--max_length",
        type=int,
        help="Longest sequence in tokens; what is longer loses its beginning. Default: 2048, or the model's own limit "
        "where that is lower. For the numbers of a training, give its --max_length.",
    )
    add("--batch_size", type=int, default=DEFAULT_BATCH_SIZE, help="Most sequences in a batch. Default: %(default)s.")
    add("--tokens_per_batch", type=int, help="Most tokens in a batch, padding included. Default: any.")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the weights. Default: %(default)s.")
    add("--device", help="Such as cuda:1 or cpu. Default: the accelerator, or the CPU where there is none.")
    add("--attn_implementation", help="eager, sdpa or flash_attention_2. Default: transformers' choice.")
    add(
        "--share_prompt",
        choices=("auto", "on", "off"),
        default="auto",
        help="Whether what two sequences begin with is read once: auto, wherever a model can; on refuses the others. "
        "Default: %(default)s.",
    )
    add(
        "--implicit_reward",
        metavar="REFERENCE",
        help="The models are DPO policies trained from REFERENCE: the reward is beta times the log ratio of both over "
        "the response's tokens.",
    )
    add("--reference_free", action="store_true", help="The models are policies, scored without a reference.")
    add("--beta", type=float, help=f"Factor of an implicit reward; moves no decision. Default: {DEFAULT_BETA}.")
    add("--confidence", type=float, default=0.95, help="Of the intervals. Default: %(default)s.")
    add("--trust_remote_code", action="store_true", help="Let the models' repositories run their own code here.")
    add("--quiet", action="store_true", help="Show no progress.")
    return parser
