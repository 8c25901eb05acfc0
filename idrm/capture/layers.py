"""Which blocks of a model are meant by a list of layer indices."""

from __future__ import annotations

from collections.abc import Iterable

from idrm.errors import InputError


def resolve_layers(indices: Iterable[int], num_layers: int, whose: str) -> tuple[int, ...]:
    """Counts negative indices from the end; keeps order and repetitions, since blocks are paired by two lists.

    Raises InputError, naming ``whose`` layers they are, for no layer at all and for one beyond the model's depth.
    """
    indices = tuple(indices)
    if not indices:
        raise InputError(f"{whose}: expected at least one layer, got none")
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise InputError(
                f"{whose}: layer {index} is beyond the model's depth; expected {-num_layers}..{num_layers - 1}"
            )
    return tuple(index % num_layers for index in indices)
