"""Pairs divided into folds of about one size, no conversation in two of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from idrm.errors import InputError


def divide_by_prompt(pairs: Sequence[Mapping[str, Any]], folds: int, seed: int) -> list[list[int]]:
    """Which pairs belong to each fold, in the order that they came in.

    Pairs whose conversations begin with the same message stay together, white space and a system message aside: then no
    prompt is in two folds, nor an earlier part of it.

    Args:
        pairs: messages as `idrm.preference.formats.convert_record` gives them.
        folds: how many, at least two.
        seed: of the order in which conversations go to the fold that is the smallest then.

    Raises:
        InputError: fewer conversations than folds.
    """
    messages: dict[str, int] = {}
    # A few pairs differ from the first message on: they join the conversations of both.
    edges = [
        [messages.setdefault(_first_message(pair[side]), len(messages)) for side in ("chosen", "rejected")]
        for pair in pairs
    ]
    sources, targets = zip(*edges, strict=True)
    graph = coo_array((np.ones(len(edges)), (sources, targets)), shape=(len(messages), len(messages)))
    _, component = connected_components(graph, directed=False)
    conversations: dict[int, list[int]] = {}
    for index, source in enumerate(sources):
        conversations.setdefault(component[source], []).append(index)
    if len(conversations) < folds:
        raise InputError(f"expected {folds} different prompts at least for so many folds, found {len(conversations)}")
    members = list(conversations.values())
    random.Random(seed).shuffle(members)
    divided: list[list[int]] = [[] for _ in range(folds)]
    for indices in members:
        min(divided, key=len).extend(indices)
    return [sorted(fold) for fold in divided]


def _first_message(messages: Sequence[Mapping[str, str]]) -> str:
    """What a conversation begins with: its system message, which all may share, is none of it."""
    first = next((message for message in messages if message["role"] != "system"), messages[0])
    return " ".join(first["content"].split())
