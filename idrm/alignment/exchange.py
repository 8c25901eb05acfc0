"""A control: the teacher reads every pair's tokens exchanged for those of another pair."""

from hashlib import sha256
from itertools import cycle, islice
from typing import Any

from datasets import Dataset

from idrm.alignment.encoding import digest_of_reading
from idrm.errors import InputError


def exchange_teacher_texts(pairs: Dataset) -> Dataset:
    """Has the teacher read another pair in the place of each.

    All that concerns units and lengths stays, as do special tokens and what takes no part: the maps have the right size
    and an encoder's usual structure of positions and separators, and say nothing of their pair. A pair's tokens come
    from the one that follows it in the order of lengths, segment for segment, and are repeated where that one is
    shorter.

    Args:
        pairs: encoded, each read in one input.

    Raises:
        InputError: fewer than two pairs have units.
    """
    tokens = pairs["teacher_tokens"][:]
    order = sorted((index for index in range(len(tokens)) if tokens[index]), key=lambda index: tokens[index])
    if len(order) < 2:
        raise InputError(f"--teacher_control other_pair: needs two pairs with units at least, found {len(order)}")
    other_of = dict(zip(order, [*order[1:], order[0]], strict=True))

    def exchanged(pair: dict[str, Any], index: int) -> dict[str, Any]:
        ids = list(pair["teacher_input_ids"])
        if index in other_of:
            other = pairs[other_of[index]]
            segments = [[other["teacher_input_ids"][place] for place in places] for places in other["teacher_places"]]
            for places, segment in zip(pair["teacher_places"], segments, strict=True):
                # An empty segment of the other pair has nothing to give: both of its segments are read then.
                donor = segment or [token for part in segments for token in part]
                for place, token in zip(places, islice(cycle(donor), len(places)), strict=True):
                    ids[place] = token
        return {"teacher_input_ids": ids, "teacher_reading": digest_of_reading({**pair, "teacher_input_ids": ids})}

    return pairs.map(
        exchanged,
        with_indices=True,
        new_fingerprint=sha256(f"{pairs._fingerprint} exchanged".encode()).hexdigest()[:32],
        load_from_cache_file=False,
        desc="Exchanging what the teacher reads",
    )
