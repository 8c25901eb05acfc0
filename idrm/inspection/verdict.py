"""The sentences that the numbers of an inspection allow, and none beyond them."""

from __future__ import annotations

from idrm.inspection.findings import STANDARD_ERRORS, Inspection, TeacherFindings
from idrm.inspection.measures import Crossing


def verdict(inspection: Inspection) -> list[str]:
    """One sentence or two each, in order of weight: accuracy, which block, how teachers differ."""
    first, *others = inspection.teachers
    letters = {id(teacher): inspection.letter(index) for index, teacher in enumerate(inspection.teachers)}
    prefix = {key: f"{letter}: " if others else "" for key, letter in letters.items()}
    sentences = [prefix[id(teacher)] + _accuracy(teacher) for teacher in inspection.teachers]
    sentences += [prefix[id(teacher)] + _structure(teacher) for teacher in inspection.teachers]
    sentences += [f"A against {letters[id(other)]}: {_comparison(first, other)}" for other in others]
    return sentences


def _accuracy(teacher: TeacherFindings) -> str:
    if teacher.accuracy is None:
        if not teacher.is_nli_classifier:
            return (
                "No head for NLI's labels: nothing shows that it is tuned on NLI, and an untuned teacher is much worse."
            )
        return (
            "NLI accuracy not measured. Maps alone do not show whether an encoder is tuned on NLI, and an untuned "
            "teacher is much worse."
        )
    found = teacher.accuracy
    measured = f"NLI accuracy {found.accuracy:.1%} on {found.examples:,} examples"
    if found.per_label:
        lowest = min(found.per_label, key=lambda label: found.per_label[label].accuracy)
        measured += f" (lowest: {lowest}, {found.per_label[lowest].accuracy:.1%})"
    chance = f"the most frequent label alone gives {found.chance:.1%}"
    if not found.is_above_chance:
        return (
            f"{measured}; {chance}, and this is not {STANDARD_ERRORS} standard errors above: nothing shows that it is "
            "tuned on NLI, unless it has the labels in another order than the data."
        )
    if found.reads_both is None:
        return f"{measured}; {chance}. It has learnt to tell these labels."
    others = f"{chance}, and with other pairs' premises it has {found.with_other_premises:.1%}"
    if found.reads_both:
        return f"{measured}; {others}. It has learnt to tell these labels, and reads both texts for it."
    return (
        f"{measured}; {others}, from which this is not {STANDARD_ERRORS} standard errors away: it tells the labels by "
        "the hypothesis alone, which teaches no interaction."
    )


def _structure(teacher: TeacherFindings) -> str:
    layer, last = teacher.most_row_specific_layer, max(teacher.blocks)
    if not teacher.blocks[layer].responses.row_specific_distance:
        return (
            "In no block do the rows of the maps between the responses differ (responses of one token have one row): "
            "nothing there compares the two."
        )
    sentence = (
        f"Between the responses, block {teacher.label(layer)} has the most row-specific structure: "
        f"{_between_responses(teacher, layer)}."
    )
    if layer != last:
        sentence += f" Block {teacher.label(last)}: {_between_responses(teacher, last)}."
    return f"{sentence} Positions and equal tokens are row-specific too: look at the picture."


def _between_responses(teacher: TeacherFindings, layer: int) -> str:
    block = teacher.blocks[layer]
    return f"distance {block.responses.row_specific_distance:.2f}, {_crossing(block.response_crossing)}"


def _crossing(crossing: Crossing) -> str:
    if crossing.ratio is None:
        return "without responses to cross between"
    return f"crossing at {crossing.ratio:.2f} times a uniform map's share"


def _comparison(first: TeacherFindings, other: TeacherFindings) -> str:
    if first.is_nli_classifier != other.is_nli_classifier:
        which = "first" if first.is_nli_classifier else "second"
        told = f"Only the {which} has a head for NLI's labels"
    elif first.accuracy is None or other.accuracy is None:
        told = "Not told apart by accuracy, which was not measured for both"
    elif first.accuracy.is_above_chance != other.accuracy.is_above_chance:
        which = "first" if first.accuracy.is_above_chance else "second"
        told = f"By accuracy, only the {which} has learnt NLI's labels"
    else:
        difference = first.accuracy.accuracy - other.accuracy.accuracy
        told = f"NLI accuracy differs by {100 * difference:+.1f} points"
    distances = {layer: block.distance_to_first for layer, block in other.blocks.items()}
    apart = {layer: distance for layer, distance in distances.items() if distance is not None}
    if not apart:
        return f"{told}. No block at the same distance from the end read the same tokens, to compare entry by entry."
    layer = max(apart, key=lambda layer: (apart[layer], layer))
    if not apart[layer]:
        return f"{told}. Their maps are the same in every block."
    own = first.blocks[first.num_layers + other.from_end(layer)]
    return (
        f"{told}. Their maps lie furthest apart in block {other.label(layer)}, by {apart[layer]:.2f}, where those of "
        f"the first lie {own.intra.distance + own.inter.distance:.2f} from uniform ones; that they differ does not say "
        "which is tuned."
    )
