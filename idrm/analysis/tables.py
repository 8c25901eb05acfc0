"""The numbers of the analyses as tables: lists of rows, each a mapping from column to value, and their CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from idrm.analysis.interaction_scores import InteractionScores
from idrm.analysis.sensitivity import SweptPoint, SweptRun
from idrm.analysis.stages import StageAnalysis
from idrm.evaluation.statistics import Interval, bootstrap_interval

Rows: TypeAlias = list[dict[str, Any]]

# Shares are real numbers, of which resampling costs more than of hits and misses.
_RESAMPLES_OF_SHARES = 1_000


def stage_rows(analysis: StageAnalysis) -> Rows:
    """For rightly and wrongly decided pairs, chosen and rejected, and each stage.

    Columns: decision ("right", "wrong"), sequence, stage (from 1), pairs, attention (mean over pairs), share (of the
    attention to content; mean, and low and high of its 95% interval over prompts), cumulative_share (up to this stage).
    """
    rows = []
    shares, right = analysis.shares, analysis.won[0]
    for decision, chosen in (("right", right), ("wrong", ~right)):
        prompts = [prompt for prompt, counts in zip(analysis.prompts, chosen, strict=True) if counts]
        if not prompts:
            continue
        for side, sequence in enumerate(("chosen", "rejected")):
            means = shares[chosen, side].mean(axis=0)
            for stage, (mean, running) in enumerate(zip(means, means.cumsum(), strict=True)):
                interval = bootstrap_interval(shares[chosen, side, stage], prompts, resamples=_RESAMPLES_OF_SHARES)
                rows.append(
                    {
                        "decision": decision,
                        "sequence": sequence,
                        "stage": stage + 1,
                        "pairs": len(prompts),
                        "attention": analysis.attention[chosen, side, stage].mean(),
                        "share": mean,
                        **_bounds("share", interval),
                        "cumulative_share": running,
                    }
                )
    return rows


def masked_accuracy_rows(analysis: StageAnalysis) -> Rows:
    """For each number of stages masked from the front, from none on.

    Columns: masked_percent (of the content tokens), pairs, accuracy (and low and high of its 95% interval over
    prompts), ties (share of pairs with equal rewards, which count as wrong).
    """
    stages = len(analysis.rewards)
    return [
        {
            "masked_percent": 100 * masked / stages,
            "pairs": len(won),
            "accuracy": won.mean(),
            **_bounds("accuracy", bootstrap_interval(won, analysis.prompts)),
            "ties": tied.mean(),
        }
        for masked, (won, tied) in enumerate(zip(analysis.won, analysis.tied, strict=True))
    ]


def score_rows(scores: InteractionScores) -> Rows:
    """One row for each pair of tokens.

    Columns: query, key (places among the content tokens that are looked at, from 0), query_token, key_token, score.
    """
    return [
        {"query": i, "key": j, "query_token": query, "key_token": key, "score": scores.scores[i, j]}
        for i, query in enumerate(scores.rows.texts)
        for j, key in enumerate(scores.columns.texts)
    ]


def run_rows(runs: Sequence[SweptRun]) -> Rows:
    """The runs of a sweep, by alpha, m and seed. Columns: alpha, top_blocks, seed, accuracy, folder."""
    ordered = sorted(runs, key=lambda run: (run.alpha, run.top_blocks or 0, run.seed, run.folder))
    return [
        {
            "alpha": run.alpha,
            "top_blocks": run.top_blocks,
            "seed": run.seed,
            "accuracy": run.accuracy,
            "folder": run.folder,
        }
        for run in ordered
    ]


def point_rows(points: Sequence[SweptPoint]) -> Rows:
    """The points of a sweep. Columns: alpha, top_blocks (empty where alpha is 0), seeds, mean, lowest, highest."""
    return [asdict(point) for point in points]


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A header and the rows in UTF-8; numbers as they are, to the last digit."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return file.getvalue().encode(errors="replace")


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
