"""`idrm pipeline`: runs the steps of a pipeline file and writes its tables; run again, it goes on."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from idrm.child_processes import last_lines, launcher_of
from idrm.command_line import FlagParser, fields_of, named_values, require_at_least, split_at_dashes
from idrm.embedded.judge import serve
from idrm.pipeline.specification import Pipeline, read_pipeline
from idrm.pipeline.steps import Place, StepFailed, require_runnable, run_steps
from idrm.pipeline.tables import write_tables
from idrm.processes import command
from idrm.run_folder import require_writable, sole_use

logger = logging.getLogger("idrm.pipeline")


@dataclass
class PipelineArguments:
    """What is done with a pipeline."""

    output_dir: str = field(default="idrm-pipeline", metadata={"help": "Folder for steps, logs and tables."})
    values: list[str] | None = field(
        default=None, metadata={"help": "Instead of the file's own values: name=value ..."}
    )
    jobs: int = field(default=1, metadata={"help": "Steps at a time, which share this machine's cores."})
    launcher: str = field(
        default=sys.executable,
        metadata={"help": "What starts a training, such as 'deepspeed --num_gpus 8'. Default: this Python."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        run(*parse_arguments(argv))


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Pipeline, PipelineArguments, list[str]]:
    """The pipeline, what is done with it, and the tokens behind -- that every training is given.

    Raises:
        InputError: an unknown flag, a value of the wrong kind, or a file that is no pipeline.
    """
    argv, training = split_at_dashes(argv)
    parser = FlagParser((PipelineArguments,), "idrm pipeline")
    parser.add_argument("pipeline", metavar="PIPELINE.YAML", help="The pipeline file; see docs/pipelines.md.")
    parser.epilog = "Flags after -- are given to every training: idrm pipeline FILE -- --deepspeed ds_zero3.json"
    values, _ = parser.values(argv)
    require_at_least(values, {"jobs": 1})
    arguments = PipelineArguments(**fields_of(PipelineArguments, values))
    return read_pipeline(Path(values["pipeline"]), named_values(arguments.values)), arguments, training


def run(pipeline: Pipeline, arguments: PipelineArguments, training: Sequence[str]) -> None:
    """Runs what is not finished of a pipeline, then writes and prints its tables.

    Args:
        training: tokens of flags that every training is given; they win over the pipeline's own.

    Raises:
        InputError: anything the user can put right; before any step.
        SystemExit: a step failed; its exit status is passed on.
    """
    folder = Path(arguments.output_dir).expanduser().absolute()
    place = Place(folder, launcher_of("--launcher", arguments.launcher), training)
    require_writable("--output_dir", folder)
    require_runnable(pipeline, place)
    with sole_use("--output_dir", folder) as held, contextlib.ExitStack() as stack:
        judge = None if pipeline.embedded_judge is None else stack.enter_context(serve())
        try:
            run_steps(pipeline, place, judge=judge, jobs=arguments.jobs, inherited=[held])
        except StepFailed as failure:
            print(last_lines(failure.log), file=sys.stderr)
            logger.error("%s; the same command goes on from there", failure)
            sys.exit(failure.status)
        if pipeline.tables:
            write_tables(folder, pipeline)
