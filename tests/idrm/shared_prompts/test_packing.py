"""Where every token of a pair stands in the row."""

import torch

from idrm.shared_prompts import pack_pairs
from idrm.shared_prompts.packing import PackedPair


def test_every_sequence_is_in_the_row_at_its_own_positions(pairs):
    packed = pack_pairs(*pairs)
    assert [pair[1:] for pair in packed.pairs] == [
        (20, 7, 9),
        (0, 5, 6),
        (12, 0, 4),
        (12, 4, 0),
        (1, 1, 1),
        (30, 15, 2),
    ]
    assert packed.input_ids.shape == packed.position_ids.shape == (1, packed.pairs[-1].end)
    ends = packed.sequence_ends.view(2, -1)
    for index, pair in enumerate(packed.pairs):
        for segment, sequence in enumerate((pairs[0][index], pairs[1][index])):
            places = [pair.place(segment, position) for position in range(len(sequence))]
            assert packed.input_ids[0, places].tolist() == sequence
            assert packed.position_ids[0, places].tolist() == list(range(len(sequence)))
            assert ends[segment, index] == places[-1]
    # Each token once: nothing is padded, nothing there twice.
    assert sum(pair.shared + pair.chosen + pair.rejected for pair in packed.pairs) == packed.input_ids.numel()


def test_the_common_beginning_is_the_longest_one():
    packed = pack_pairs([[5, 6, 7, 8]], [[5, 6, 7, 9, 8]])
    assert packed.pairs == (PackedPair(0, 3, 1, 2),)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 8]]


def test_masks_of_rejected_rows(pairs):
    packed = pack_pairs(*pairs)
    for pair, mask in zip(packed.pairs, packed.rejected_masks, strict=True):
        if not pair.rejected or not pair.shared:
            assert mask is None
            continue
        rows = torch.arange(pair.shared, pair.shared + pair.rejected)
        keys = torch.arange(pair.shared + pair.rejected)
        assert torch.equal(mask[0, 0], keys[None] <= rows[:, None])
