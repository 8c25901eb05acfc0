"""`idrm grid`: trains and evaluates the rows of a grid file, and writes their table; run again, it goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from idrm.arguments import given_flags
from idrm.child_processes import last_lines, launcher_of
from idrm.command_line import FlagParser, fields_of, named_values, require_at_least, split_at_dashes
from idrm.errors import InputError
from idrm.evaluation.benchmark import Benchmark
from idrm.evaluation.catalogue import benchmark_sources, load_benchmark
from idrm.evaluation.evaluation import Scoring, evaluate_models, require_scorable
from idrm.evaluation.outcomes import Outcomes, read_outcomes, write_outcomes
from idrm.grid.runs import Run, RunFailed, require_runnable, train_runs
from idrm.grid.specification import Grid, read_grid, require_free
from idrm.grid.table import cells_of, columns_of, require_columns, write_table
from idrm.processes import command
from idrm.run_folder import require_writable, sole_use

logger = logging.getLogger("idrm.grid")


@dataclass
class GridArguments:
    """What is done with a grid."""

    output_dir: str = field(default="idrm-grid", metadata={"help": "Folder for runs, outcomes, logs and the table."})
    runs_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the runs, which grids may share. Default: runs in --output_dir."},
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "Seeds of every row, instead of the file's."})
    values: list[str] | None = field(
        default=None, metadata={"help": "What {name} in the file stands for: name=value ..."}
    )
    jobs: int = field(default=1, metadata={"help": "Training runs at a time, which share this machine's cores."})
    launcher: str = field(
        default=sys.executable,
        metadata={"help": "What starts idrm/train.py, such as 'deepspeed --num_gpus 8'. Default: this Python."},
    )
    benchmark_split: str = field(default="test", metadata={"help": "Split of benchmarks that are pairs."})
    eval_dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = field(
        default="float32", metadata={"help": "Dtype that models are evaluated in."}
    )
    eval_batch_size: int = field(default=16, metadata={"help": "Most sequences in a batch of the evaluation."})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        run(*parse_arguments(argv))


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Grid, GridArguments, dict[str, object]]:
    """The grid, what is done with it, and the flags behind -- that every training run is given.

    Raises:
        InputError: an unknown flag, a value of the wrong kind, or a file that is no grid.
    """
    argv, training = split_at_dashes(argv)
    parser = FlagParser((GridArguments,), "idrm grid")
    parser.add_argument("grid", metavar="GRID.YAML", help="The grid file; see docs/grids.md.")
    parser.epilog = "Flags after -- are given to every training run: idrm grid GRID.YAML -- --max_steps 100"
    values, _ = parser.values(argv)
    require_at_least(values, {"jobs": 1, "eval_batch_size": 1})
    arguments = GridArguments(**fields_of(GridArguments, values))
    training_flags = given_flags(training)
    require_free(training_flags, "behind --")
    return read_grid(Path(values["grid"]), arguments.seeds, named_values(arguments.values)), arguments, training_flags


def runs_of(grid: Grid, arguments: GridArguments, training: dict[str, object]) -> list[Run]:
    """All its runs, row by row."""
    folder = Path(arguments.runs_dir or f"{arguments.output_dir}/runs").expanduser().absolute()
    return [row.run(folder, seed, training) for row in grid.rows for seed in row.seeds]


def run(grid: Grid, arguments: GridArguments, training: dict[str, object]) -> None:
    """Runs what is not finished of a grid, then writes and prints its table.

    Args:
        training: flags of `idrm train` that every run is given; they win over its row's own.

    Raises:
        InputError: anything the user can put right; before any training.
        SystemExit: a run failed; its exit status is passed on.
    """
    folder = Path(arguments.output_dir).expanduser().absolute()
    launcher = launcher_of("--launcher", arguments.launcher)
    require_writable("--output_dir", folder)
    if arguments.runs_dir is not None:
        require_writable("--runs_dir", Path(arguments.runs_dir).expanduser())
    if not grid.benchmarks:
        raise InputError(f"{grid.title}: names no benchmarks to evaluate its rows on")
    runs = runs_of(grid, arguments, training)
    require_runnable(runs)
    scoring = Scoring(dtype=arguments.eval_dtype, batch_size=arguments.eval_batch_size)
    models = [row for row in grid.rows if row.model is not None]
    for row in models:
        require_scorable(row.model, scoring)
    # What cannot be loaded is refused before hours of training.
    entries = [name if name == source else f"{name}={source}" for name, source in grid.benchmarks.items()]
    benchmarks = [load_benchmark(source, split=arguments.benchmark_split) for source in benchmark_sources(entries)]
    columns = columns_of(benchmarks)
    require_columns(grid, columns)
    with sole_use("--output_dir", folder) as held:
        try:
            train_runs(runs, log_folder=folder / "logs", launcher=launcher, jobs=arguments.jobs, inherited=[held])
        except RunFailed as failure:
            print(last_lines(failure.log), file=sys.stderr)
            logger.error("%s; the same command goes on from there", failure)
            sys.exit(failure.status)
        outcomes: dict[str, dict[int | None, dict[str, Outcomes]]] = {row.name: {} for row in grid.rows}
        for run in runs:
            place = folder / "outcomes" / run.folder.parent.name / run.folder.name
            label = f"{run.row}, seed {run.seed}"
            outcomes[run.row][run.seed] = _outcomes(label, str(run.folder), place, benchmarks, scoring, moves=True)
        for row in models:
            place = folder / "outcomes" / row.slug / "model"
            outcomes[row.name][None] = _outcomes(row.name, row.model, place, benchmarks, scoring, moves=False)
        write_table(folder, grid, cells_of(grid, columns, outcomes), benchmarks)


def _outcomes(
    label: str, model: str, place: Path, benchmarks: Sequence[Benchmark], scoring: Scoring, *, moves: bool
) -> dict[str, Outcomes]:
    """What a model decided, by benchmark; measured once and then read.

    `moves`: whether the model may have lain elsewhere then, as a run does whose grid was moved with it.
    """
    files = {benchmark.name: place / f"{benchmark.name}.jsonl" for benchmark in benchmarks}
    found = {name: read_outcomes(path) for name, path in files.items() if path.exists()}
    for benchmark in benchmarks:
        known = found.get(benchmark.name)
        if known is not None and known.origin["version"] != benchmark.version:
            raise InputError(
                f"{files[benchmark.name]}: was measured on other items of {benchmark.name}; give another --output_dir"
            )
        if known is not None and not moves and known.origin["model"] != model:
            raise InputError(
                f"{files[benchmark.name]}: was measured of {known.origin['model']} and not of {model}; give another "
                "--output_dir"
            )
    missing = [benchmark for benchmark in benchmarks if benchmark.name not in found]
    if missing:
        measured = evaluate_models({label: model}, missing, scoring)
        for result in measured:
            write_outcomes(files[result.benchmark], result)
            found[result.benchmark] = result
    return found
