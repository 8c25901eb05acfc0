"""The uniform mean of the weights of several runs, tensor by tensor: WARM, arXiv 2401.12187.

    w = (1 / M) * sum over runs m of w_m,        of every weight, the reward head's included

which is a good model where all runs began from the same weights, head included (linear mode connectivity, section 3).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from idrm.ensembles.checkpoint import INDEX_FILE, Checkpoint
from idrm.ensembles.sameness import AveragedRun
from idrm.errors import InputError

RECORD_FILE = "averaged.json"
FORMAT = "idrm average 1"
# Numbers of one tensor that are held in float64 at once, 8 MiB for each of a few sums.
NUMBERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Spread:
    """How far the runs are from their mean, in relation to it: sqrt(mean over m of |w_m - w|^2) / |w|.

    Of runs from one initialisation it is small; independent initialisations of one scale have sqrt(M - 1).

    Attributes:
        overall: of all weights as one vector.
        widest: of the tensor with two dimensions or more where it is largest.
        widest_name: of that tensor; "" where there is none.
    """

    overall: float
    widest: float
    widest_name: str


def write_average(
    runs: Sequence[AveragedRun],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    advance: Callable[[int], None] = lambda numbers: None,
) -> Spread:
    """Writes a sequence classifier with the mean weights, in files as the first run has them, whole or not there.

    In memory are one shard of the result and a part of one tensor of one run. Sums are float64; each weight keeps its
    dtype. The mean of one run is that run, bit for bit.

    Args:
        runs: as `idrm.ensembles.sameness.require_averageable` accepts them.
        tokenizer: of all of them.
        folder: not there, or empty.
        advance: called with a count of numbers of the result that are done.

    Raises:
        InputError: weights that are not finite; integers that differ; a folder that cannot be written.
    """
    checkpoints = [run.checkpoint for run in runs]
    first = checkpoints[0]
    squares: dict[str, tuple[float, float]] = {}
    with _renamed_when_whole(folder) as unfinished:
        for file, names in first.files.items():
            shard = {}
            for name in names:
                shard[name], squares[name] = _mean(checkpoints, name, advance)
            save_file(shard, unfinished / file, metadata=first.metadata(file))
            del shard
        if first.index is not None:
            (unfinished / INDEX_FILE).write_text(first.index, encoding="utf-8")
        tokenizer.save_pretrained(unfinished)
        shutil.copyfile(first.folder / "config.json", unfinished / "config.json")
        spread = _spread(squares, first)
        record = {
            "format": FORMAT,
            "weights": "uniform mean (WARM, arXiv 2401.12187)",
            "runs": [{"path": str(run.folder), "base": run.base, "seed": run.seed} for run in runs],
            "spread": {"overall": spread.overall, "widest": spread.widest, "widest_tensor": spread.widest_name},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (unfinished / RECORD_FILE).write_text(text, encoding="utf-8")
    return spread


def _mean(
    checkpoints: Sequence[Checkpoint], name: str, advance: Callable[[int], None]
) -> tuple[torch.Tensor, tuple[float, float]]:
    """The mean of a tensor in its dtype; the sums of squares of the runs' distances from it, per run, and of itself."""
    shape = checkpoints[0].tensors[name].shape
    length = shape[0] if shape else 1
    numbers_in_a_row = math.prod(shape[1:])
    step = max(1, NUMBERS_AT_ONCE // max(1, numbers_in_a_row))
    parts = ((start, min(length, start + step)) for start in range(0, length, step))
    result: torch.Tensor | None = None
    distance = size = 0.0
    for start, end in parts:
        values = checkpoints[0].rows(name, start, end)
        if result is None:
            result = torch.empty(shape, dtype=values.dtype)
        target = result[start:end] if shape else result
        if values.is_floating_point():
            total, total_of_squares = values.double(), values.double().square()
            _require_finite(values, checkpoints[0], name)
            for checkpoint in checkpoints[1:]:
                values = checkpoint.rows(name, start, end).double()
                _require_finite(values, checkpoint, name)
                total += values
                total_of_squares += values.square()
            mean = total.div_(len(checkpoints))
            target.copy_(mean)
            size += float(mean.square().sum())
            # Mean of squares minus square of the mean: no run is read twice, and float64 has digits to spare.
            distance += float(total_of_squares.div_(len(checkpoints)).sub_(mean.square()).clamp_(min=0).sum())
        else:
            for checkpoint in checkpoints[1:]:
                if not torch.equal(values, checkpoint.rows(name, start, end)):
                    raise InputError(f"{checkpoint.folder}: {name} holds other integers than {checkpoints[0].folder}")
            target.copy_(values)
        advance((end - start) * numbers_in_a_row)
    if result is None:  # a tensor without rows
        result = checkpoints[0].rows(name, 0, 0)
    return result, (distance, size)


def _require_finite(values: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    if not values.isfinite().all():
        raise InputError(f"{checkpoint.folder}: {name} holds numbers that are not finite")


def _spread(squares: dict[str, tuple[float, float]], checkpoint: Checkpoint) -> Spread:
    def ratio(distance: float, size: float) -> float:
        return math.sqrt(distance / size) if size else 0.0

    distances, sizes = zip(*squares.values(), strict=True)
    # Biases begin at 0 or 1 and tell little.
    matrices = {name: ratio(*both) for name, both in squares.items() if len(checkpoint.tensors[name].shape) > 1}
    widest = max(matrices, key=matrices.__getitem__, default="")
    return Spread(ratio(math.fsum(distances), math.fsum(sizes)), matrices.get(widest, 0.0), widest)


@contextlib.contextmanager
def _renamed_when_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that gets its name at the end, and is gone where something fails."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, folder)  # over an empty folder, never over another
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
