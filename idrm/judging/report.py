"""A win rate as a table for the terminal, and as the files judge.json, judge.md and verdicts.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idrm.errors import InputError
from idrm.judging.comparison import CONFIDENCE, JudgedPair, WinRate
from idrm.judging.judge import Verdict
from idrm.run_folder import write_whole

JSON_FILE, MARKDOWN_FILE, VERDICTS_FILE = "judge.json", "judge.md", "verdicts.jsonl"

HOW_TO_READ = f"""\
The judge reads every pair twice, once with either response first. A pair is a *win* of A if it prefers A in both
orders, or in one and says tie in the other; a *lose* the other way round; a *tie* if it prefers one response in one
order and the other in the other, or says tie twice, or is not asked because the responses are the same text. A pair of
which a verdict could not be read, reminders and all, is *unparseable*, and none of the three. The *win rate* is
win / (win + lose), its {CONFIDENCE:.0%} interval a bootstrap over the prompts of the pairs won or lost.

*Inconsistent*: of the pairs with two verdicts, those in which it prefers one response in one order and the other in the
other. *First preferred*: of the verdicts that prefer a response, those for the one read first; a judge whom places do
not impress has 50%. *Reminded*, *unparseable verdicts*: of all verdicts, those that took a reminder, and those that
could not be read. Where much is inconsistent or unparseable, the win rate speaks of few pairs."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what came of it.

    Attributes:
        a, b: the response files.
        judge: the judge's name at the endpoint.
        endpoint: its URL.
        template: the file of the question, None for the built-in one.
        template_digest: of its text.
        result: the win rate of A.
        judged: the pairs.
    """

    a: str
    b: str
    judge: str
    endpoint: str
    template: str | None
    template_digest: str
    result: WinRate
    judged: Sequence[JudgedPair]

    @property
    def answered_by(self) -> list[str]:
        """The names that the judge gave itself, often dated ones."""
        return sorted({v.answered_by for pair in self.judged for v in pair.verdicts if v.answered_by is not None})


def print_table(comparison: Comparison, console: Console) -> None:
    """The table for a terminal."""
    table = Table(title=escape(f"A against B, judged by {comparison.judge}"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(comparison.result):
        table.add_row(escape(name), escape(value))
    console.print(table)


def markdown(comparison: Comparison) -> str:
    """judge.md: the table, what was compared, and how to read it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(comparison.result))
    named = f" (as it names itself: {', '.join(comparison.answered_by)})" if comparison.answered_by else ""
    template = "built in" if comparison.template is None else comparison.template
    return (
        f"# Win rate\n\n- A = {comparison.a}\n- B = {comparison.b}\n"
        f"- judge: {comparison.judge}{named}, temperature 0, at {comparison.endpoint}\n"
        f"- template: {template} (digest {comparison.template_digest})\n\n"
        f"| A against B | |\n| :--- | ---: |\n{rows}\n\n{HOW_TO_READ}\n"
    )


def write_files(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes the three files, each whole or not at all; InputError where the folder refuses them."""
    result = asdict(comparison.result)
    content = {
        "a": comparison.a,
        "b": comparison.b,
        "judge": comparison.judge,
        "answered_by": comparison.answered_by,
        "endpoint": comparison.endpoint,
        "temperature": 0,
        "template": comparison.template,
        "template_digest": comparison.template_digest,
        "confidence": CONFIDENCE,
        **result,
    }
    verdicts = (json.dumps(_record(pair), ensure_ascii=False) for pair in comparison.judged)
    files = {
        VERDICTS_FILE: "".join(f"{line}\n" for line in verdicts),
        MARKDOWN_FILE: markdown(comparison),
        JSON_FILE: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in files.items():
        try:
            write_whole(folder / name, text)
        except OSError as error:
            raise InputError(f"--output_dir {folder}: {error.strerror} while writing {name}") from error
    return [folder / name for name in files]


def _rows(result: WinRate) -> list[tuple[str, str]]:
    asked = result.pairs - result.identical
    ties = f"{result.ties:,}" + (f" ({result.identical:,} the same text)" if result.identical else "")
    interval = "-" if result.interval is None else f"{result.interval.low:.1%} to {result.interval.high:.1%}"
    return [
        ("win rate", _percent(result.win_rate)),
        (f"{CONFIDENCE:.0%} interval", interval),
        ("win", f"{result.wins:,}"),
        ("tie", ties),
        ("lose", f"{result.loses:,}"),
        ("unparseable", f"{result.unparseable:,}"),
        ("pairs", f"{result.pairs:,}"),
        (f"inconsistent, of {asked - result.unparseable:,} pairs", _percent(result.inconsistent_share)),
        ("first preferred", _percent(result.first_share)),
        (f"reminded, of {result.verdicts:,} verdicts", _percent(result.reminded_share)),
        (f"unparseable verdicts, of {result.verdicts:,}", _percent(result.unparseable_share)),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _record(judged: JudgedPair) -> dict[str, Any]:
    identifier = {} if judged.pair.identifier is None else {"id": judged.pair.identifier}
    return {
        **identifier,
        "prompt": [message._asdict() for message in judged.pair.prompt],
        "a": judged.pair.a,
        "b": judged.pair.b,
        "outcome": judged.outcome,
        "a_first": _verdict(judged.a_first),
        "b_first": _verdict(judged.b_first),
    }


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    return None if verdict is None else {"preference": verdict.preference, "answers": list(verdict.answers)}
