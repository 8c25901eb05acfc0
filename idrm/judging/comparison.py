"""Both orders of every pair put to a judge, and the win rate that comes of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Literal, TypeAlias

from rich.console import Console
from rich.progress import track

from idrm.evaluation.statistics import Interval, bootstrap_interval
from idrm.judging.judge import Judge, Message, Verdict
from idrm.judging.responses import ResponsePair

Outcome: TypeAlias = Literal["win", "tie", "lose", "unparseable"]
CONFIDENCE = 0.95

# How much a preference is in favour of what the judge read first.
_FOR_FIRST = {"first": 1, "second": -1, "tie": 0}


@dataclass(frozen=True)
class JudgedPair:
    """A pair and what the judge said of it.

    Attributes:
        pair: the responses of A and of B.
        a_first, b_first: the verdicts where A's and where B's response was read first; None for two responses that are
            the same text, which no judge is asked about.
    """

    pair: ResponsePair
    a_first: Verdict | None
    b_first: Verdict | None

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in (self.a_first, self.b_first) if verdict is not None)

    @property
    def is_parsed(self) -> bool:
        """Whether every verdict that was asked for could be read."""
        return all(verdict.preference is not None for verdict in self.verdicts)

    @property
    def is_inconsistent(self) -> bool:
        """Whether the judge prefers one response in one order and the other in the other."""
        return {verdict.preference for verdict in self.verdicts} in ({"first"}, {"second"}) and self.is_parsed

    @property
    def outcome(self) -> Outcome:
        """What the pair is for A: won where both orders prefer A, or one does and the other is a tie."""
        if not self.is_parsed:
            return "unparseable"
        if self.a_first is None or self.b_first is None:
            return "tie"
        balance = _FOR_FIRST[self.a_first.preference] - _FOR_FIRST[self.b_first.preference]
        return "win" if balance > 0 else "lose" if balance < 0 else "tie"


@dataclass(frozen=True)
class WinRate:
    """What a judge makes of A against B.

    Attributes:
        pairs: how many there are; wins + ties + loses + unparseable.
        wins, ties, loses: pairs by their outcome for A.
        unparseable: pairs of which a verdict could not be read, in either order.
        identical: pairs, among the ties, of one and the same text.
        win_rate: wins / (wins + loses); None without any.
        interval: its confidence interval, by a bootstrap over the prompts of the pairs won or lost.
        inconsistent_share: among the pairs asked about whose two verdicts were read, the share in which the judge
            prefers one response in one order and the other in the other; None without any such pairs.
        first_share: among the verdicts that prefer a response, the share that prefers the one read first: 0.5 for a
            judge whom places do not impress; None without any.
        verdicts: how many were asked for: two for each pair that is not identical.
        reminded_share: the share of these in which the judge had to be reminded to give its verdict.
        unparseable_share: the share of these that could not be read, reminders and all.
    """

    pairs: int
    wins: int
    ties: int
    loses: int
    unparseable: int
    identical: int
    win_rate: float | None
    interval: Interval | None
    inconsistent_share: float | None
    first_share: float | None
    verdicts: int
    reminded_share: float | None
    unparseable_share: float | None


def judge_pairs(
    judge: Judge, pairs: Sequence[ResponsePair], *, concurrency: int = 4, show_progress: bool = True
) -> list[JudgedPair]:
    """Asks a judge about every pair in both orders, once for equal questions, and keeps the pairs' order.

    Args:
        judge: whom to ask.
        pairs: the responses.
        concurrency: threads that ask at once.
        show_progress: a bar on stderr.

    Raises:
        Whatever the judge raises, at once: questions under way are abandoned.
    """
    asked = [pair for pair in pairs if pair.a != pair.b]
    questions = list(
        dict.fromkeys(
            (pair.prompt, first, second) for pair in asked for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        )
    )

    stopped = threading.Event()

    def answered(index: int) -> tuple[int, Verdict | None]:
        # The failure that stopped it comes out of the pool too, maybe after this.
        if stopped.is_set():
            return index, None
        try:
            return index, judge.verdict(*questions[index])
        except Exception:
            stopped.set()
            raise

    verdicts: dict[tuple[tuple[Message, ...], str, str], Verdict | None] = {}
    # Its threads are daemons, and leaving it does not wait for them: an interruption is one.
    with ThreadPool(concurrency) as pool:
        try:
            for index, verdict in track(
                pool.imap_unordered(answered, range(len(questions))),
                "Judging",
                total=len(questions),
                console=Console(stderr=True),
                transient=True,
                disable=not show_progress,
            ):
                verdicts[questions[index]] = verdict
        finally:
            stopped.set()
    return [
        JudgedPair(pair, verdicts.get((pair.prompt, pair.a, pair.b)), verdicts.get((pair.prompt, pair.b, pair.a)))
        for pair in pairs
    ]


def win_rate(judged: Sequence[JudgedPair]) -> WinRate:
    """Counts the outcomes (arXiv 2508.02618, Table 1)."""
    outcomes = [pair.outcome for pair in judged]
    decided = [pair for pair in judged if pair.outcome in ("win", "lose")]
    won = [float(pair.outcome == "win") for pair in decided]
    read_twice = [pair for pair in judged if pair.verdicts and pair.is_parsed]
    verdicts = [verdict for pair in judged for verdict in pair.verdicts]
    preferring = [verdict for verdict in verdicts if verdict.preference in ("first", "second")]
    return WinRate(
        pairs=len(judged),
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        loses=outcomes.count("lose"),
        unparseable=outcomes.count("unparseable"),
        identical=sum(not pair.verdicts for pair in judged),
        win_rate=_share(won),
        interval=bootstrap_interval(won, [pair.pair.prompt for pair in decided], confidence=CONFIDENCE)
        if decided
        else None,
        inconsistent_share=_share([pair.is_inconsistent for pair in read_twice]),
        first_share=_share([verdict.preference == "first" for verdict in preferring]),
        verdicts=len(verdicts),
        reminded_share=_share([len(verdict.answers) > 1 for verdict in verdicts]),
        unparseable_share=_share([verdict.preference is None for verdict in verdicts]),
    )


def _share(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
