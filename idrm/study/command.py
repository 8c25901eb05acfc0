"""`idrm study`: folds, students, teacher, all runs, their evaluation and the table, by one command that resumes."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.progress import track

from idrm.child_processes import last_lines
from idrm.command_line import FlagParser, fields_of, require_at_least
from idrm.errors import InputError, require_folder
from idrm.evaluation.catalogue import load_pairs
from idrm.evaluation.evaluation import evaluate_models
from idrm.evaluation.outcomes import Outcomes, read_outcomes, write_outcomes
from idrm.grid.runs import Run, RunFailed, last_training_record, require_runnable, train_runs
from idrm.processes import command
from idrm.run_folder import require_writable, sole_use
from idrm.study.findings import RowFindings, length_accuracy, length_preference, row_findings
from idrm.study.preparation import Places, read_pairs, save_students, tune_teacher, write_folds
from idrm.study.recipe import Recipe, read_recipe
from idrm.study.report import write_report

logger = logging.getLogger("idrm.study")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "study" / "hh-harmless.yaml"


@dataclass
class StudyArguments:
    """What a study is made of."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference pairs, as `idrm train --dataset_name` takes them."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub name or folder."})
    encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder that becomes the teacher, and as it comes the untuned one."}
    )
    nli_dataset_name: str | None = field(
        default=None, metadata={"help": "NLI pairs that it is fine-tuned on; not needed with --teacher_name_or_path."}
    )
    nli_test_dataset_name: str | None = field(default=None, metadata={"help": "NLI pairs that it is tested on."})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "A teacher that is fine-tuned already, instead of one made here."}
    )
    recipe: str = field(
        default=str(RECIPE), metadata={"help": "YAML file that describes the study. Default: that of docs/study.md."}
    )
    jobs: int = field(default=1, metadata={"help": "Training runs at a time, which share this machine's cores."})
    output_dir: str = field(default="idrm-study", metadata={"help": "Folder for everything that comes out."})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        values, _ = FlagParser((StudyArguments,), "idrm study").values(argv)
        require_at_least(values, {"jobs": 1})
        run(StudyArguments(**fields_of(StudyArguments, values)))


def run(arguments: StudyArguments) -> None:
    """Runs what is not finished of a study in its output folder, then writes and prints its table.

    Raises:
        InputError: anything the user can put right; before any training.
        SystemExit: a process failed; its exit status is passed on.
    """
    _require_complete(arguments)
    recipe = read_recipe(Path(arguments.recipe))
    places = Places(Path(arguments.output_dir).expanduser().absolute())
    require_writable("--output_dir", places.folder)
    records = read_pairs(arguments.dataset_name, arguments.dataset_split)
    runs = study_runs(recipe, places, arguments)
    require_runnable([run for of_fold in runs for run in of_fold])
    with sole_use("--output_dir", places.folder) as held:
        write_folds(records, recipe, places)
        save_students(records, recipe, places)
        if arguments.teacher_name_or_path is None:
            flags = {
                "model_name_or_path": arguments.encoder_name_or_path,
                "dataset_name": arguments.nli_dataset_name,
                "test_dataset_name": arguments.nli_test_dataset_name,
            }
            tune_teacher(recipe, places, flags)
        try:
            # Every fold's first, so that an interrupted study has something of each.
            ordered = [run for runs_of_place in zip(*runs, strict=True) for run in runs_of_place]
            train_runs(ordered, log_folder=places.logs, jobs=arguments.jobs, inherited=[held])
        except RunFailed as failure:
            print(last_lines(failure.log), file=sys.stderr)
            logger.error("%s; the same command goes on from there", failure)
            sys.exit(failure.status)
        outcomes = evaluated(runs, places)
        write_report(places.folder, recipe.grid.title, *findings(recipe, runs, outcomes), origin(recipe, arguments))


def study_runs(recipe: Recipe, places: Places, arguments: StudyArguments) -> list[list[Run]]:
    """For each fold all runs, in the order of rows and seeds."""
    names = {
        "tuned_teacher": arguments.teacher_name_or_path or places.tuned_teacher,
        "untuned_teacher": arguments.encoder_name_or_path,
        "teacher_cache": places.teacher_cache,
    }

    def filled(value: object) -> object:
        return value.format(**names) if isinstance(value, str) else value

    return [
        [
            row.run(
                places.runs(fold),
                seed,
                {
                    **{name: filled(value) for name, value in row.flags.items()},
                    "model_name_or_path": places.student(seed),
                    "dataset_name": places.fold(fold) / "train.jsonl",
                },
            )
            for row in recipe.grid.rows
            for seed in row.seeds
        ]
        for fold in range(recipe.folds)
    ]


def evaluated(runs: Sequence[Sequence[Run]], places: Places) -> list[dict[Run, Outcomes]]:
    """For each fold what every run decided on its pairs: measured once, then read."""
    of_folds = []
    for fold, of_fold in enumerate(runs):
        files = {run: places.outcomes(fold) / run.folder.parent.name / f"{run.folder.name}.jsonl" for run in of_fold}
        missing = [run for run in of_fold if not files[run].exists()]
        if missing:
            benchmark = load_pairs(str(places.fold(fold) / "test.jsonl"), name=f"fold_{fold}")
            logger.info("Evaluating %d runs on the %d pairs of fold %d.", len(missing), len(benchmark.items), fold)
        for run in track(missing, f"fold {fold}", transient=True, disable=not missing):
            (result,) = evaluate_models({run.row: str(run.folder)}, [benchmark], show_progress=False)
            write_outcomes(files[run], result)
        of_folds.append({run: read_outcomes(files[run]) for run in of_fold})
    return of_folds


def findings(
    recipe: Recipe, runs: Sequence[Sequence[Run]], outcomes: Sequence[Mapping[Run, Outcomes]]
) -> tuple[list[RowFindings], float]:
    """The rows of the table, and the accuracy of one who knows lengths alone."""
    of_row: dict[str, dict[int, list[Outcomes]]] = {row.name: {} for row in recipe.grid.rows}
    ratios: dict[str, list[float | None]] = {row.name: [] for row in recipe.grid.rows}
    for fold, of_fold in enumerate(runs):
        for run in of_fold:
            of_row[run.row].setdefault(run.seed, []).append(outcomes[fold][run])
            ratios[run.row].append(last_training_record(run, "interaction_ratio"))
    baseline = recipe.grid.baseline
    rows = [
        row_findings(
            name,
            of_row[name],
            of_row[baseline] if baseline not in (None, name) else None,
            None if None in ratios[name] else sum(ratios[name]) / len(ratios[name]),
        )
        for name in of_row
    ]
    of_any_run = next(iter(next(iter(of_row.values())).values()))
    prefers = [length_preference(of_any_run, fold) for fold in range(recipe.folds)]
    return rows, length_accuracy(of_any_run, prefers)


def origin(recipe: Recipe, arguments: StudyArguments) -> dict[str, str]:
    """What the numbers were measured with."""
    return {
        "pairs": Path(arguments.dataset_name).name,
        "recipe": Path(arguments.recipe).name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": f"{date.today():%Y-%m-%d}",
    }


def _require_complete(arguments: StudyArguments) -> None:
    needed = ["dataset_name", "encoder_name_or_path"]
    if arguments.teacher_name_or_path is None:
        needed.append("nli_dataset_name")
    for name in needed:
        if getattr(arguments, name) is None:
            raise InputError(f"--{name}: a study needs it; `idrm study --help` lists the flags")
    for name in ("encoder_name_or_path", "teacher_name_or_path"):
        if getattr(arguments, name) is not None:
            require_folder(f"--{name} {getattr(arguments, name)}", getattr(arguments, name))
