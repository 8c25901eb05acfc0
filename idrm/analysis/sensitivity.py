"""Accuracy over alpha and over m, the number of supervised blocks, of finished runs: Figure 5 of arXiv 2508.02618."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from idrm.arguments import own_argument_names
from idrm.command_line import RUN_FILE
from idrm.errors import InputError
from idrm.evaluation.outcomes import read_outcomes

RESULTS_FILE = "all_results.json"
# What may differ among runs and change nothing, or is what the figure shows.
_NO_SETTINGS = {
    *("teacher_cache", "teacher_cache_max_gb", "kernel_impl", "dataset_num_proc"),
    *("eval_dataset_name", "eval_dataset_split"),
    *("alpha", "top_blocks", "student_layers", "teacher_layers"),
}
# Those of transformers' flags that a sweep most easily mixes up.
_TRANSFORMERS_SETTINGS = ("learning_rate", "max_steps", "num_train_epochs")


@dataclass(frozen=True)
class SweptRun:
    """One training run of a sweep, and what it scores.

    Attributes:
        folder: the run's.
        alpha: weight of the interaction loss.
        top_blocks: m, how many blocks from the end are supervised; None where alpha is 0 and none is.
        seed: of the training.
        accuracy: share of pairs that are decided rightly.
        settings: what else may tell it from another run, by flag, of the values in its run.yaml.
    """

    folder: Path
    alpha: float
    top_blocks: int | None
    seed: int
    accuracy: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweptPoint:
    """Mean and range over seeds of one alpha and m; runs of one seed (on folds, say) are averaged before."""

    alpha: float
    top_blocks: int | None
    seeds: int
    mean: float
    lowest: float
    highest: float


def find_runs(sources: Iterable[str | Path], *, metric: str | None = None) -> list[SweptRun]:
    """The runs in some folders, or of some outcomes files, with their accuracies.

    Args:
        sources: run folders, or folders above them, whose all_results.json has the accuracy; or outcomes files of `idrm
            eval`, whose model is a run folder. A run that is named twice counts once.
        metric: the accuracy's name in all_results.json; None where there is only one, such as eval_accuracy.

    Raises:
        InputError: nothing there, a file that is damaged, a run without that accuracy or that supervises other blocks
            than the last ones, or one run with several outcomes files.
    """
    runs: dict[Path, SweptRun] = {}
    for source in map(Path, sources):
        path = source.expanduser()
        if path.is_file():
            outcomes = read_outcomes(path)
            folder = Path(str(outcomes.origin.get("model", ""))).expanduser()
            if not (folder / RUN_FILE).is_file():
                raise InputError(f"{path}: its model, {folder}, is no run folder; expected one with {RUN_FILE}")
            folders, accuracy = [folder], float(outcomes.won.mean())
        else:
            folders, accuracy = _run_folders(path), None
        for folder in folders:
            run = _run(folder.resolve(), accuracy, metric)
            known = runs.setdefault(run.folder, run)
            if known.accuracy != run.accuracy:
                raise InputError(
                    f"{path}: {folder} has accuracy {known.accuracy:.4f} by what was named before and "
                    f"{run.accuracy:.4f} here; name one result of each run"
                )
    return list(runs.values())


def sweep(runs: Sequence[SweptRun]) -> list[SweptPoint]:
    """One point for each alpha and m, ascending.

    Raises InputError where all runs have the same.
    """
    accuracies: dict[tuple[float, int | None], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        accuracies[run.alpha, run.top_blocks][run.seed].append(run.accuracy)
    if len(accuracies) < 2:
        raise InputError(
            f"all {len(runs)} runs have alpha {runs[0].alpha:g} and m {runs[0].top_blocks}; expected several"
            if runs
            else "no runs to compare"
        )
    points = []
    for alpha, top_blocks in sorted(accuracies, key=lambda key: (key[0], key[1] or 0)):
        of_seeds = [sum(values) / len(values) for values in accuracies[alpha, top_blocks].values()]
        mean = sum(of_seeds) / len(of_seeds)
        points.append(SweptPoint(alpha, top_blocks, len(of_seeds), mean, min(of_seeds), max(of_seeds)))
    return points


def other_differences(runs: Sequence[SweptRun]) -> list[str]:
    """The settings, alpha, m and seed aside, in which runs that supervise anything differ."""
    supervised = [run.settings for run in runs if run.alpha]
    names = sorted({name for settings in supervised for name in settings})
    return [name for name in names if len({repr(settings.get(name)) for settings in supervised}) > 1]


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if (path / RUN_FILE).is_file():
        return [path]
    # Teachers' runs may lie beside those of reward models.
    folders = [file.parent for file in sorted(path.rglob(RUN_FILE)) if "alpha" in _recorded(file)]
    if not folders:
        raise InputError(f"{path}: holds no run; expected a folder with {RUN_FILE}, or one above such folders")
    return folders


def _recorded(path: Path) -> dict[str, Any]:
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(recorded, dict):
        raise InputError(f"{path}: expected a mapping of flags to values, found {type(recorded).__name__}")
    return recorded


def _run(folder: Path, accuracy: float | None, metric: str | None) -> SweptRun:
    path = folder / RUN_FILE
    recorded = _recorded(path)
    alpha = recorded.get("alpha")
    if not isinstance(alpha, int | float):
        raise InputError(f"{path}: has no alpha; expected the {RUN_FILE} of `idrm train`")
    settings = {*own_argument_names(), *_TRANSFORMERS_SETTINGS} - _NO_SETTINGS
    return SweptRun(
        folder=folder,
        alpha=float(alpha),
        top_blocks=_top_blocks(recorded, path) if alpha else None,
        seed=recorded.get("seed", TrainingArguments.seed),
        accuracy=_accuracy(folder, metric) if accuracy is None else accuracy,
        settings={name: recorded[name] for name in sorted(settings & recorded.keys())},
    )


def _top_blocks(recorded: dict[str, Any], path: Path) -> int:
    """m, from the flag or from two equal lists of layers that mean the same."""
    student, teacher = recorded.get("student_layers"), recorded.get("teacher_layers")
    if student is None and teacher is None:
        return recorded.get("top_blocks") or 1
    if student != teacher or sorted(student, reverse=True) != list(range(-1, -len(student) - 1, -1)):
        raise InputError(
            f"{path}: supervises student_layers {student} by teacher_layers {teacher}; expected the last m blocks"
        )
    return len(student)


def _accuracy(folder: Path, metric: str | None) -> float:
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); expected a run that has ended") from error
    named = sorted(name for name in results if name.startswith("eval_") and name.endswith("_accuracy"))
    if metric is None and len(named) != 1:
        found = ", ".join(named) or "none"
        raise InputError(f"{path}: expected one accuracy, found {found}; name one with --metric")
    name = metric or named[0]
    if not isinstance(results.get(name), int | float):
        raise InputError(f"{path}: has no {name!r}; its accuracies are: {', '.join(named) or 'none'}")
    return float(results[name])
