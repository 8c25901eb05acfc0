"""A share of the training pairs, kept back to evaluate on where no evaluation data is named."""

import random

from datasets import Dataset

from idrm.errors import InputError


def hold_out(pairs: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divides pairs so that no premise is on both sides: SNLI has each with several hypotheses.

    Args:
        pairs: a column premise.
        share: of the premises, 0 < share < 1, which goes to the second part; one at least.
        seed: chooses them, on every rank the same.

    Returns:
        (training pairs, pairs held out), each in the order that they came in.

    Raises:
        InputError: there is one premise only.
    """
    column = pairs["premise"][:]
    premises = list(dict.fromkeys(column))
    if len(premises) < 2:
        raise InputError("one premise cannot be divided: give --eval_dataset_name")
    random.Random(seed).shuffle(premises)
    chosen = set(premises[: min(max(1, round(share * len(premises))), len(premises) - 1)])
    held_out = [premise in chosen for premise in column]
    return (
        pairs.select([index for index, held in enumerate(held_out) if not held]),
        pairs.select([index for index, held in enumerate(held_out) if held]),
    )
