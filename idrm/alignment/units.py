"""Units: the smallest stretches of text that two tokenisations both cut out whole (DESIGN section 5).

Token spans are half-open ranges of coordinates that mean the same on both sides. Units are the connected components of
the overlap of both sides' spans, so it does not matter how either tokenizer cuts words, characters or bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]

NO_UNIT = -1


@dataclass(frozen=True)
class Units:
    """The units of one segment, numbered from 0 in the order of the text.

    Attributes:
        student: for each student token its unit, or NO_UNIT; without the latter non-decreasing.
        teacher: the same for the teacher's tokens.
        starts: the coordinate at which each unit starts.
        ends: the coordinate at which each unit ends.
    """

    student: list[int]
    teacher: list[int]
    starts: list[int]
    ends: list[int]

    def __len__(self) -> int:
        return len(self.starts)


def find_units(student_spans: Sequence[Span], teacher_spans: Sequence[Span]) -> Units:
    """The units of two tokenisations of one text, by one sweep over the spans of both.

    Args:
        student_spans: (start, end) of each student token. An empty span (start >= end) belongs to no unit.
        teacher_spans: the same for the teacher's tokens.

    A component with tokens on one side only is no unit. Where a normaliser reordered characters, so that a token starts
    before the one that precedes it, both are taken as one stretch: units never go back along the tokens.
    """
    student, teacher = [NO_UNIT] * len(student_spans), [NO_UNIT] * len(teacher_spans)
    student_queue, teacher_queue = _in_order(student_spans), _in_order(teacher_spans)
    starts: list[int] = []
    ends: list[int] = []
    s = t = 0
    while s < len(student_queue) and t < len(teacher_queue):
        first_s, first_t = s, t
        start = min(student_queue[s][0], teacher_queue[t][0])
        end = start + 1
        grown = True
        while grown:
            grown = False
            while s < len(student_queue) and student_queue[s][0] < end:
                end = max(end, student_queue[s][1])
                s += 1
                grown = True
            while t < len(teacher_queue) and teacher_queue[t][0] < end:
                end = max(end, teacher_queue[t][1])
                t += 1
                grown = True
        if s > first_s and t > first_t:
            for _, _, token in student_queue[first_s:s]:
                student[token] = len(starts)
            for _, _, token in teacher_queue[first_t:t]:
                teacher[token] = len(starts)
            starts.append(start)
            ends.append(end)
    return Units(student, teacher, starts, ends)


def _in_order(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    """(start, end, token) of the tokens with a span, with starts lowered where a later token starts earlier."""
    queue = []
    lowest = None
    for token in range(len(spans) - 1, -1, -1):
        start, end = spans[token]
        if start < end:
            lowest = start if lowest is None or start < lowest else lowest
            queue.append((lowest, end, token))
    queue.reverse()
    return queue
