"""What a segment loses to fit a model: whole units from the left of the prompt, the response last (DESIGN section 5).

A segment is described to these functions by `remaining`: remaining[u] tokens are left when its first u units are cut,
and with them everything that stands before the token after their last one. So remaining[0] is the length, remaining[-1]
what follows the last unit, and a header right before the first unit that stays is kept. Lengths and limits leave out
what is always kept (special tokens that the model puts around the text).
"""

from bisect import bisect_left
from collections.abc import Sequence
from operator import neg

Pair = tuple[int, int]


def remaining_tokens(unit_of_token: Sequence[int], num_units: int) -> list[int]:
    """remaining[u] for u in 0..num_units; tokens without a unit are marked by a negative number."""
    remaining = [len(unit_of_token)] * (num_units + 1)
    for token, unit in enumerate(unit_of_token):
        if unit >= 0:
            remaining[unit + 1] = len(unit_of_token) - token - 1
    return remaining


def shared_cuts(starts: Sequence[Sequence[int]], prompt_units: Sequence[int]) -> list[Pair]:
    """The ways to cut two segments with the same prompt text at the same place of it, from nothing to the whole prompt.

    Args:
        starts: for both segments the coordinates at which their units start.
        prompt_units: for both segments how many of the units, the first ones, belong to the prompt.

    Returns:
        Pairs of numbers of units to cut, rising: (0, 0) first, `prompt_units` last.
    """
    units_before = {start: units for units, start in enumerate(starts[1][: prompt_units[1]])}
    cuts = [
        (units, units_before[start])
        for units, start in enumerate(starts[0][: prompt_units[0]])
        if units and start in units_before
    ]
    return [(0, 0), *cuts, (prompt_units[0], prompt_units[1])]


def cut_each(remaining: Sequence[Sequence[int]], shared: Sequence[Pair] | None, limit: int) -> Pair:
    """How many units two segments lose that are read one by one, each of at most `limit` tokens (the student).

    `shared` holds the cuts of a prompt that both have, which both lose alike; None if the prompts differ. All units are
    lost by a segment that does not fit even then.
    """
    first = (0, 0)
    if shared is not None:
        for first in shared:
            if all(left[cut] <= limit for left, cut in zip(remaining, first, strict=True)):
                return first
    chosen, rejected = (
        min(max(cut, bisect_left(left, -limit, key=neg)), len(left) - 1)
        for left, cut in zip(remaining, first, strict=True)
    )
    return chosen, rejected


def cut_together(
    remaining: Sequence[Sequence[int]], prompt_units: Sequence[int], shared: Sequence[Pair] | None, limit: int
) -> Pair:
    """How many units two segments lose that are read in one input of at most `limit` tokens (the teacher).

    `shared` as in `cut_each`; `prompt_units` as in `shared_cuts`. Where one segment must lose the next unit, because
    the prompts differ or are gone, it is the one that has more tokens of that kind (prompt, then response) left.
    """
    first = (0, 0)
    if shared is not None:
        for first in shared:
            if remaining[0][first[0]] + remaining[1][first[1]] <= limit:
                return first
    cut = list(first)
    for last in (prompt_units, [len(left) - 1 for left in remaining]):
        while sum(left[units] for left, units in zip(remaining, cut, strict=True)) > limit:
            removable = [left[units] - left[end] for left, units, end in zip(remaining, cut, last, strict=True)]
            if not any(units < end for units, end in zip(cut, last, strict=True)):
                break
            longer = int(removable[1] > removable[0])
            if cut[longer] == last[longer]:
                longer = 1 - longer
            cut[longer] += 1
    return cut[0], cut[1]


def lengths_within(lengths: Sequence[int], limit: int) -> Pair:
    """The lengths to which two texts that no cut of units makes fit are shortened together: the longer one yields."""
    chosen = min(lengths[0], max(limit - lengths[1], (limit + 1) // 2))
    return chosen, min(lengths[1], limit - chosen)
