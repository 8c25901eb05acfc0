"""A picture of one pair's map, one panel a teacher."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from idrm.inspection.measures import PairUnits

_PANEL_INCHES = 8.0
_DOTS_PER_INCH = 150
_SMALLEST_FONT, _LARGEST_FONT = 3.5, 8.0
# A few keys take most of the attention: the colours end where all but this share of the entries lie.
_CLIPPED_SHARE = 0.005


@dataclass(frozen=True)
class Panel:
    """One map (units, units) with a title, the text of each unit, and where segments and responses lie."""

    title: str
    values: Tensor
    tokens: Sequence[str]
    units: PairUnits


def draw_heat_map(panels: Sequence[Panel], normalization: str) -> bytes:
    """A PNG with all panels in the same colours.

    Rows attend to columns. Solid lines part chosen from rejected, dashed ones each response from its prompt; units are
    labelled where a label would still be legible.
    """
    figure = Figure(figsize=((_PANEL_INCHES + 1.5) * len(panels), _PANEL_INCHES + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    scale = PowerNorm(0.5, vmin=0.0, vmax=max(map(_brightest, panels)) or 1.0)
    for axis, panel in zip(axes, panels, strict=True):
        image = axis.imshow(panel.values.cpu().float().numpy(), norm=scale, cmap="magma", interpolation="nearest")
        axis.set_title(panel.title, fontsize=9, parse_math=False)
        _mark_borders(axis, panel.units)
        _label(axis, panel)
    whole = "each sequence" if normalization == "block" else "both sequences"
    figure.colorbar(image, ax=list(axes), shrink=0.8, label=f"share of a row's attention within {whole}")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens come in every script, and matplotlib's font has not all of them: it draws a box.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        figure.savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    return picture.getvalue()


def _brightest(panel: Panel) -> float:
    entries = panel.values.flatten().double().sort().values
    return entries[int((len(entries) - 1) * (1 - _CLIPPED_SHARE))].item() if len(entries) else 0.0


def _mark_borders(axis, units: PairUnits) -> None:
    for segment, response in zip(units.segments, units.responses, strict=True):
        borders = [(segment.start, "-")] if segment.start else []
        if segment.start < response.start < segment.stop:
            borders.append((response.start, "--"))
        for border, style in borders:
            for line in (axis.axhline, axis.axvline):
                line(border - 0.5, color="white", linestyle=style, linewidth=0.8)


def _label(axis, panel: Panel) -> None:
    size = min(_LARGEST_FONT, 0.9 * _PANEL_INCHES * 72 / max(len(panel.tokens), 1))
    if size < _SMALLEST_FONT:
        axis.set_xlabel(f"{len(panel.tokens)} units of the pair, chosen then rejected")
        return
    places = range(len(panel.tokens))
    axis.set_xticks(places, panel.tokens, rotation=90, fontsize=size, parse_math=False)
    axis.set_yticks(places, panel.tokens, fontsize=size, parse_math=False)
