"""Sequences scored in batches of about equal lengths, with progress shown and their order kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence, Sized
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

DEFAULT_BATCH_SIZE = 16


class _Sequence(Sized, Hashable, Protocol):
    """A sequence of tokens that can be compared with others."""


Scored = TypeVar("Scored", bound=_Sequence)


def progress_bar(show_progress: bool) -> Progress:
    """A bar on stderr, where that is a terminal: stdout is for results."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (show_progress and console.is_terminal))


def batches_by_length(lengths: Sequence[int], batch_size: int, tokens_per_batch: int | None = None) -> list[list[int]]:
    """Indices of sequences in batches, the longest first, in case they are too much for the memory.

    Args:
        lengths: of the sequences, in tokens.
        batch_size: most sequences in a batch.
        tokens_per_batch: most tokens in a batch, padding included; a sequence that is longer is alone. None: any.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = batches and len(batches[-1]) < batch_size
        if fits and tokens_per_batch is not None:
            fits = longest * (len(batches[-1]) + 1) <= tokens_per_batch
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches


def score_in_batches(
    sequences: Sequence[Scored],
    score: Callable[[list[Scored]], Tensor],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    tokens_per_batch: int | None = None,
    description: str = "Scoring",
    show_progress: bool = True,
) -> list[Any]:
    """The score of every sequence, in the order given.

    A sequence that occurs several times is scored once: rounding, which differs from batch to batch, must not decide
    between equal responses.

    Args:
        sequences: what `score` takes a batch of.
        score: from a batch of n sequences to (n,) scores, or to (n, m), a list of m for each.
        batch_size, tokens_per_batch: as `batches_by_length` has them.
        description: beside the bar, which counts tokens.
    """
    distinct = list(dict.fromkeys(sequences))
    lengths = [len(sequence) for sequence in distinct]
    scores: dict[Scored, Any] = {}
    with progress_bar(show_progress) as progress:
        task = progress.add_task(description, total=sum(lengths))
        for batch in batches_by_length(lengths, batch_size, tokens_per_batch):
            members = [distinct[index] for index in batch]
            scores.update(zip(members, score(members).tolist(), strict=True))
            progress.advance(task, sum(lengths[index] for index in batch))
    return [scores[sequence] for sequence in sequences]
