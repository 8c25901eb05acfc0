"""Interaction scores as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from matplotlib import colormaps
from matplotlib.colors import to_hex

from idrm.analysis.interaction_scores import InteractionScores, TokensOfSequence
from idrm.analysis.pictures import COLOUR_MAP

_STYLE = """
body { font-family: sans-serif; margin: 1.5em; }
table { border-collapse: collapse; font-size: 12px; }
th { font-weight: normal; padding: 2px 4px; background: #fff; position: sticky; }
thead th { top: 0; writing-mode: vertical-rl; text-align: left; vertical-align: bottom; z-index: 1; }
tbody th { left: 0; text-align: right; white-space: nowrap; }
td { min-width: 14px; height: 14px; padding: 0; }
.prompt { color: #777; }
tr.response > * { border-top: 2px dashed #000; }
.first { border-left: 2px dashed #000; }
"""
# Even what a token's text might hold beyond the escaping loads and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def scores_page(scores: InteractionScores, title: str) -> str:
    """A table of coloured cells with the tokens at its sides; a cell's score shows when pointed at.

    Tokens are escaped, and the page loads and runs nothing. Prompts are grey; dashed lines part responses from them.
    """
    colours = colormaps[COLOUR_MAP]
    rows, columns = scores.rows, scores.columns
    head = "".join(
        f"<th{_classes(columns, place, 'first')}>{_text(token)}</th>" for place, token in enumerate(columns.texts)
    )
    body = []
    for row, token in enumerate(rows.texts):
        cells = []
        for column, score in enumerate(scores.scores[row]):
            first = ' class="first"' if 0 < column == columns.response_start else ""
            colour = to_hex(colours((float(score) + 1.0) / 2.0))
            label = escape(f"{token} · {columns.texts[column]}: {score:+.3f}")
            cells.append(f'<td{first} style="background:{colour}" title="{label}"></td>')
        response = ' class="response"' if 0 < row == rows.response_start else ""
        body.append(f"<tr{response}><th{_classes(rows, row, '')}>{_text(token)}</th>{''.join(cells)}</tr>")
    description = (
        f"Rows: queries of {rows.name} (reward {rows.reward:.4f}). Columns: keys of {columns.name} (reward "
        f"{columns.reward:.4f}). Layer {scores.layer}; mean over heads of query.key before the softmax, minus its "
        "mean, over the largest magnitude: red is above the mean, blue below."
    )
    newline = "\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(description)}</p>\n<table>\n<thead><tr><th></th>{head}</tr></thead>\n"
        f"<tbody>\n{newline.join(body)}\n</tbody>\n</table>\n</body>\n</html>\n"
    )


def _text(token: str) -> str:
    return f"<bdi>{escape(token)}</bdi>"


def _classes(tokens: TokensOfSequence, place: int, at_response: str) -> str:
    if place < tokens.response_start:
        return ' class="prompt"'
    return f' class="{at_response}"' if at_response and 0 < place == tokens.response_start else ""
