"""Batches by length: bounds, order, and sequences that occur twice."""

import pytest
import torch

from idrm.evaluation.batching import batches_by_length, score_in_batches

LENGTHS = [5, 90, 17, 17, 3, 60, 41, 5, 88]


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, None), (3, None), (4, 100), (9, 1), (100, 200)])
def test_batches_hold_everything_once_and_keep_their_bounds(batch_size, tokens):
    batches = batches_by_length(LENGTHS, batch_size, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        longest = max(LENGTHS[index] for index in batch)
        assert len(batch) <= batch_size
        assert tokens is None or len(batch) == 1 or len(batch) * longest <= tokens
    in_order = [LENGTHS[index] for batch in batches for index in batch]
    assert in_order == sorted(LENGTHS, reverse=True)


def test_batches_are_filled():
    assert len(batches_by_length([10] * 12, 100, 40)) == 3
    assert len(batches_by_length([10] * 12, 5)) == 3


def test_scores_come_in_the_order_of_the_sequences_and_equal_ones_are_scored_once():
    seen = []

    def score(batch):
        seen.extend(batch)
        return torch.tensor([float(sum(sequence)) for sequence in batch])

    sequences = [(1, 2), (7,), (1, 2), (4, 4, 4), (7,)]
    assert score_in_batches(sequences, score, batch_size=2, show_progress=False) == [3.0, 7.0, 3.0, 12.0, 7.0]
    assert len(seen) == 3
    assert score_in_batches([], score, show_progress=False) == []
