"""Pictures of the analyses, as PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from idrm.analysis.interaction_scores import InteractionScores, TokensOfSequence
from idrm.analysis.sensitivity import SweptPoint

COLOUR_MAP = "RdBu_r"
_DOTS_PER_INCH = 150
_PANEL_INCHES = 8.0
_SMALLEST_FONT, _LARGEST_FONT = 3.5, 8.0
_COLOURS = {"right": "tab:blue", "wrong": "tab:red"}


def draw_stages(stages: Sequence[Mapping[str, Any]], masked: Sequence[Mapping[str, Any]]) -> bytes:
    """Attention to each stage in chosen and in rejected sequences, and accuracy over what is masked, with intervals.

    Args:
        stages: rows of ``tables.stage_rows``.
        masked: rows of ``tables.masked_accuracy_rows``.
    """
    figure = _figure(15.0, 4.5)
    chosen, rejected, accuracy = figure.subplots(1, 3)
    rejected.sharey(chosen)
    for axis, sequence in ((chosen, "chosen"), (rejected, "rejected")):
        for place, decision in ((-0.2, "right"), (0.2, "wrong")):
            rows = [row for row in stages if (row["decision"], row["sequence"]) == (decision, sequence)]
            if not rows:
                continue
            axis.bar(
                [row["stage"] + place for row in rows],
                [row["share"] for row in rows],
                yerr=_whiskers(rows, "share"),
                width=0.4,
                color=_COLOURS[decision],
                label=f"decided {'rightly' if decision == 'right' else 'wrongly'} ({rows[0]['pairs']:,} pairs)",
                error_kw={"linewidth": 0.8},
            )
        axis.set_title(f"{sequence} sequences")
        axis.set_xticks(sorted({row["stage"] for row in stages}))
        axis.set_xlabel("stage of the content, front to end")
        axis.legend()
    chosen.set_ylabel("share of the pooled token's attention to content")
    chosen.yaxis.set_major_formatter(PercentFormatter(1.0))
    places = [row["masked_percent"] for row in masked]
    accuracy.plot(places, [row["accuracy"] for row in masked], marker="o", color="black")
    accuracy.fill_between(
        places,
        [row["accuracy_low"] for row in masked],
        [row["accuracy_high"] for row in masked],
        color="black",
        alpha=0.15,
    )
    accuracy.axhline(0.5, color="grey", linestyle=":", linewidth=1.0)
    accuracy.set_title("accuracy with the front masked")
    accuracy.set_xlabel("content masked from the front")
    accuracy.xaxis.set_major_formatter(PercentFormatter())
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    return _png(figure)


def draw_scores(scores: InteractionScores) -> bytes:
    """The scores as a heat map; dashed lines part each response from its prompt.

    Tokens are labelled where a label would still be legible.
    """
    rows, columns = scores.rows, scores.columns
    figure = _figure(_PANEL_INCHES + 1.5, _PANEL_INCHES + 1.0)
    axis = figure.subplots()
    image = axis.imshow(scores.scores, cmap=COLOUR_MAP, vmin=-1.0, vmax=1.0, interpolation="nearest", aspect="auto")
    for start, tokens, line in (
        (rows.response_start, rows, axis.axhline),
        (columns.response_start, columns, axis.axvline),
    ):
        if 0 < start < len(tokens.texts):
            line(start - 0.5, color="black", linestyle="--", linewidth=0.8)
    _label(axis.set_yticks, axis.set_ylabel, rows, "queries", rotation=0)
    _label(axis.set_xticks, axis.set_xlabel, columns, "keys", rotation=90)
    axis.set_title(f"query.key between the sequences, layer {scores.layer}", fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.8, label="mean over heads, centred, over the largest magnitude")
    return _png(figure)


def draw_sensitivity(points: Sequence[SweptPoint]) -> bytes:
    """Accuracy over alpha, a line for each m, and over m, a line for each alpha; bars span the range over seeds.

    Where several m, or alphas, were swept over, those that were not are left to the other panel.
    """
    figure = _figure(11.0, 4.5)
    over_alpha, over_blocks = figure.subplots(1, 2, sharey=True)
    plain = [point for point in points if point.top_blocks is None]
    supervised = [point for point in points if point.top_blocks is not None]
    for blocks, line in _lines(supervised, "top_blocks").items():
        _plot_points(over_alpha, "alpha", [*plain, *line], f"m = {blocks}")
    for alpha, line in _lines(supervised, "alpha").items():
        _plot_points(over_blocks, "top_blocks", line, f"alpha = {alpha:g}")
    for point in plain:
        over_blocks.axhline(point.mean, color="grey", linestyle="--", linewidth=1.0, label="alpha = 0")
        over_blocks.axhspan(point.lowest, point.highest, color="grey", alpha=0.15)
    over_alpha.set_xlabel("alpha, weight of the interaction loss")
    over_alpha.set_ylabel("accuracy")
    over_alpha.yaxis.set_major_formatter(PercentFormatter(1.0))
    over_blocks.set_xlabel("m, supervised blocks from the end")
    over_blocks.set_xticks(sorted({point.top_blocks for point in supervised}))
    for axis in (over_alpha, over_blocks):
        axis.legend()
    return _png(figure)


def _lines(points: Sequence[SweptPoint], name: str) -> dict[float, list[SweptPoint]]:
    """The points by one of their values: those values that have several points, or all if none has."""
    lines: dict[float, list[SweptPoint]] = {}
    for point in points:
        lines.setdefault(getattr(point, name), []).append(point)
    longest = max(map(len, lines.values()))
    return {value: line for value, line in sorted(lines.items()) if len(line) > 1 or longest == 1}


def _plot_points(axis: Axes, name: str, points: Sequence[SweptPoint], label: str) -> None:
    below = [point.mean - point.lowest for point in points]
    above = [point.highest - point.mean for point in points]
    axis.errorbar(
        [getattr(point, name) for point in points],
        [point.mean for point in points],
        yerr=[below, above],
        marker="o",
        capsize=3.0,
        label=label,
    )


def _whiskers(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    # A percentile interval need not hold the mean.
    return [
        [max(0.0, row[name] - row[f"{name}_low"]) for row in rows],
        [max(0.0, row[f"{name}_high"] - row[name]) for row in rows],
    ]


def _label(set_ticks, set_label, tokens: TokensOfSequence, what: str, rotation: int) -> None:
    count = len(tokens.texts)
    size = min(_LARGEST_FONT, 0.9 * _PANEL_INCHES * 72 / count)
    set_label(f"{what} of {tokens.name} (reward {tokens.reward:.3f})", parse_math=False)
    if size < _SMALLEST_FONT:
        set_ticks([])
    else:
        set_ticks(range(count), tokens.texts, rotation=rotation, fontsize=size, parse_math=False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens come in every script, and matplotlib's font has not all of them: it draws a box.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        figure.savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    return picture.getvalue()
