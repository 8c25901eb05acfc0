"""Outcomes made by hand."""

from collections.abc import Sequence

import pytest

from idrm.evaluation.outcomes import Outcome, Outcomes


@pytest.fixture(scope="session")
def make_outcomes():
    """make_outcomes(margins, model="A", subsets=None): pairs whose chosen reward exceeds the rejected one by these."""

    def make(margins: Sequence[float], *, model: str = "A", benchmark: str = "held-out", subsets=None) -> Outcomes:
        items = [
            Outcome(
                item=f"item {index}",
                subset=subsets[index] if subsets else "pairs",
                prompt=f"prompt {index // 2}",
                chosen_reward=0.25 + margin,
                rejected_rewards=(0.25,),
                chosen_length=10 + index % 3,
                rejected_lengths=(11,),
            )
            for index, margin in enumerate(margins)
        ]
        return Outcomes(model, benchmark, items)

    return make
