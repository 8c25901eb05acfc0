"""Where every token of a pair stands in the row."""

import pytest
import torch

from idrm.shared_prompts import pack_pairs, packed_length, packing
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
    assert sum(map(packed_length, *pairs)) == packed.input_ids.numel()


def test_the_common_beginning_is_the_longest_one():
    packed = pack_pairs([[5, 6, 7, 8]], [[5, 6, 7, 9, 8]])
    assert packed.pairs == (PackedPair(0, 3, 1, 2),)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 8]]


def seen(packed):
    """For every token of the row, the tokens that it attends to."""
    visible = {}
    for call in packed.attention_calls:
        mask = call.mask
        if mask is None:
            assert torch.equal(call.rows, call.keys)
            mask = (
                torch.ones(call.rows.shape[1], call.rows.shape[1], dtype=torch.bool)
                .tril()
                .expand(len(call.rows), 1, -1, -1)
            )
        for part, (rows, is_row, keys) in enumerate(zip(call.rows, call.is_row, call.keys, strict=True)):
            for place, row in enumerate(rows[is_row].tolist()):
                assert row not in visible
                visible[row] = keys[mask[part, 0, place]].tolist()
    return visible


@pytest.mark.parametrize("free_padding", [0, 1 << 16], ids=["apart", "together"])
def test_every_token_is_a_row_once_and_sees_its_sequence_up_to_itself(pairs, monkeypatch, free_padding):
    monkeypatch.setattr(packing, "FREE_PADDING", free_padding)
    packed = pack_pairs(*pairs)
    assert len(packed.attention_calls) == (2 if free_padding else 10)
    visible = seen(packed)
    assert sorted(visible) == list(range(packed.input_ids.numel()))
    for pair, *sequences in zip(packed.pairs, *pairs, strict=True):
        for segment, sequence in enumerate(sequences):
            places = [pair.place(segment, position) for position in range(len(sequence))]
            for position, place in enumerate(places):
                assert visible[place] == places[: position + 1]
    rows = torch.cat([call.rows.flatten() for call in packed.attention_calls])
    assert torch.equal(rows[packed.restored], torch.arange(packed.input_ids.numel()))


def test_long_parts_are_not_padded_to_much_longer_ones():
    packed = pack_pairs([[5] * 1000, [5] * 990, [6] * 200], [[5] * 1010, [5] * 995, [6] * 201])
    assert [len(call.rows) for call in packed.attention_calls] == [1, 2, 3]
