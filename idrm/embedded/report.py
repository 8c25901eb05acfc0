"""The demonstration's table: accuracies on every split, losses and interaction ratios, over one or several seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from idrm.embedded.generator import read_data, surface_cue_accuracy
from idrm.embedded.stages import (
    EVALUATED_SPLITS,
    TEACHER_METRICS_FILE,
    TRAIN_SAMPLE,
    finished_stages,
    write_atomically,
)

RESULTS_FILE = "results.json"
FIT_TEACHER_ACCURACY = 0.9
CUE = "surface cue"
NAME_OF_MODEL = {"bt": "Bradley-Terry", "idrm": "Id-RM", "control": "uniform maps"}
TAUGHT_MODELS = ("idrm",)


def collect(run_folder: Path) -> dict[str, Any]:
    """Everything the table says about one seed, read from what its stages wrote."""
    accuracy = {CUE: {split: surface_cue_accuracy(read_data(_pairs(run_folder, split))) for split in EVALUATED_SPLITS}}
    measured = {}
    for model in NAME_OF_MODEL:
        path = run_folder / model / "all_results.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        accuracy[model] = {split: results[f"eval_{split}_accuracy"] for split in EVALUATED_SPLITS}
        measured[model] = {
            name: {split: results.get(f"eval_{split}_{name}") for split in EVALUATED_SPLITS}
            for name in ("preference_loss", "interaction_loss", "interaction_ratio")
        }
    teacher = json.loads((run_folder / "teacher" / TEACHER_METRICS_FILE).read_text(encoding="utf-8"))
    return {
        "teacher": {**teacher, "fit": teacher["dev_accuracy"] >= FIT_TEACHER_ACCURACY},
        "accuracy": accuracy,
        "measured": measured,
        "seconds": finished_stages(run_folder),
    }


def print_report(folder: Path, runs: Mapping[int, Path], console: Console | None = None) -> None:
    """Prints the table of all seeds and writes the same numbers to results.json in `folder`."""
    console = console or Console()
    of_seed = {seed: collect(run_folder) for seed, run_folder in runs.items()}
    write_atomically(folder / RESULTS_FILE, json.dumps(of_seed, indent=2))
    results = list(of_seed.values())
    unfit = [seed for seed, result in of_seed.items() if not result["teacher"]["fit"]]

    console.print()
    console.print(_accuracy_table(results, bool(unfit)))
    console.print(_loss_table(results, bool(unfit)))
    for seed, result in of_seed.items():
        teacher = result["teacher"]
        verdict = "fit" if teacher["fit"] else f"TEACHER UNFIT (below {FIT_TEACHER_ACCURACY:.0%}): Id-RM is invalid"
        minutes = sum(result["seconds"].values()) / 60
        console.print(
            f"seed {seed}: teacher's NLI dev accuracy {teacher['dev_accuracy']:.1%}, {verdict}; "
            f"all stages took {minutes:.1f} min"
        )
    for run_folder in runs.values():
        console.print(f"models: {run_folder}/{{{','.join(['teacher', *results[0]['measured']])}}}", soft_wrap=True)
    console.print(f"these numbers: {folder / RESULTS_FILE}", soft_wrap=True)
    console.print(
        "This was the embedded demonstration, on generated pairs. For a real run name --model_name_or_path, "
        "--teacher_name_or_path and --dataset_name.",
    )


def _accuracy_table(results: list[dict[str, Any]], unfit: bool) -> Table:
    table = Table(title=f"Pairwise accuracy, {_seeds(results)}")
    table.add_column("")
    for split in EVALUATED_SPLITS:
        heading = "train\nsample" if split == "train" else split.replace("_", " ").replace(" dist", "\ndist")
        table.add_column(heading, justify="right")
    for model in results[0]["accuracy"]:
        cells = [
            _summary([result["accuracy"][model][split] for result in results], "{:.1%}") for split in EVALUATED_SPLITS
        ]
        table.add_row(_name(model, unfit), *cells)
    return table


def _loss_table(results: list[dict[str, Any]], unfit: bool) -> Table:
    table = Table(title=f"Losses and interaction ratio (1: a uniform map), {_seeds(results)}")
    table.add_column("")
    columns = {
        ("preference_loss", "in_distribution"): "preference\nin distr.",
        ("preference_loss", "out_of_distribution"): "preference\nout of distr.",
        ("interaction_loss", "in_distribution"): "interaction\nin distr.",
        ("interaction_ratio", "in_distribution"): "ratio\nin distr.",
    }
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for model in results[0]["measured"]:
        cells = [
            _summary([result["measured"][model][name][split] for result in results], "{:.3f}")
            for name, split in columns
        ]
        table.add_row(_name(model, unfit), *cells)
    return table


def _pairs(run_folder: Path, split: str) -> Path:
    return run_folder / "data" / f"{TRAIN_SAMPLE if split == 'train' else split}.jsonl"


def _name(model: str, unfit: bool) -> str:
    name = NAME_OF_MODEL.get(model, model)
    return f"{name} (INVALID: teacher unfit)" if unfit and model in TAUGHT_MODELS else name


def _seeds(results: list[dict[str, Any]]) -> str:
    return "one seed" if len(results) == 1 else f"mean and range of {len(results)} seeds"


def _summary(values: list[float | None], form: str) -> str:
    """One value, or the mean of several with their range below; a dash where nothing was measured."""
    if any(value is None for value in values):
        return "-"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean}\n{form.format(min(values))} to {form.format(max(values))}"
