"""MapLayout: what it derives, and what it refuses."""

import copy
import pickle

import pytest
import torch

from idrm_kernels import MapLayout, PackedAttention, attention_map_distance


def test_a_unit_is_a_token_by_default():
    layout = MapLayout.build([0, 3, 5, 5, 9])
    assert (layout.num_examples, layout.segments, layout.total_tokens, layout.total_units) == (2, 2, 5 + 4, 9)
    assert (layout.teacher_total_tokens, layout.max_units, layout.max_unit_tokens) == (9, 5, 1)
    assert layout.unit_offsets.tolist() == list(range(10))
    assert layout.cu_units.tolist() == [0, 3, 5, 5, 9]


def test_units_of_both_sides():
    layout = MapLayout.build(
        torch.tensor([0, 4, 5], dtype=torch.int32),
        teacher_cu_seqlens=(0, 2, 4),
        cu_units=[0, 2, 3],
        unit_of_token=[0, 0, 0, 1, 2],
        teacher_unit_of_token=torch.tensor([0, 1, 2, 2]),
    )
    assert layout.unit_offsets.tolist() == [0, 3, 4, 5]
    assert layout.teacher_unit_offsets.tolist() == [0, 1, 2, 4]
    assert (layout.max_units, layout.max_unit_tokens, layout.teacher_max_unit_tokens) == (3, 3, 2)


def test_a_shared_prefix_has_its_rows_once():
    layout = MapLayout.build(
        [0, 4, 9, 9, 11],
        unit_of_token=[0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 7],
        teacher_cu_seqlens=[0, 3, 6, 6, 8],
        teacher_unit_of_token=range(8),
        shared_prefix_lens=[2, 0],
    )
    assert (layout.total_tokens, layout.total_units, layout.unit_offsets[-1]) == (9, 8, 11)
    assert layout.shared_units.tolist() == [1, 0]
    assert layout.token_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(layout.token_index, layout.device_token_index)
    assert layout.to("meta").device_token_index.device.type == "meta"


@pytest.mark.parametrize(("segments", "lengths"), [(2, [0, 0]), (1, [3, 1, 0, 2])])
def test_nothing_is_shared_by_no_tokens_or_by_one_segment(segments, lengths):
    layout = MapLayout.build([0, 3, 5, 5, 9], segments=segments, shared_prefix_lens=lengths)
    assert layout.token_index is None
    assert layout.total_tokens == 9
    assert not layout.shared_units.any()


def test_units_are_counted_when_not_given():
    layout = MapLayout.build([0, 3, 3, 5], segments=1, unit_of_token=[0, 0, 1, 2, 2])
    assert layout.cu_units.tolist() == [0, 2, 2, 3]


def test_from_mask_equals_from_padded():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False, True], [False, False, False, False], [False, True, True, False]])
    q, k = torch.randn(3, 4, 4, 8, generator=generator), torch.randn(3, 2, 4, 8, generator=generator)
    layout = MapLayout.from_mask(mask)
    assert (layout.segments, layout.num_examples, layout.cu_units.tolist()) == (1, 3, [0, 3, 3, 5])
    packed = PackedAttention.from_padded(q, k, mask, softmax_scale=0.5)
    assert packed.softmax_scale == 0.5
    assert torch.equal(packed.q, torch.stack([q[0, :, 0], q[0, :, 1], q[0, :, 3], q[2, :, 1], q[2, :, 2]]))
    assert torch.equal(packed.k[3], k[2, :, 1])
    assert attention_map_distance(packed, packed.detach(), layout).shape == (1, 5, 1)


def test_holds_what_it_validated():
    """Tensors that the caller goes on to use are copied."""
    counts, units = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 3])
    layout = MapLayout.build(counts, cu_units=counts, unit_of_token=units)
    counts.fill_(7)
    units.fill_(7)
    assert layout.cu_units.tolist() == [0, 2, 4]
    assert layout.unit_offsets.tolist() == [0, 1, 2, 3, 4]


def test_travels_between_processes():
    layout = MapLayout.build([0, 2, 3], unit_of_token=[0, 0, 1], teacher_unit_of_token=[0, 0, 1])
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert (other.segments, other.total_units, other.unit_offsets.tolist()) == (2, 2, [0, 2, 3])


def test_moves_between_devices():
    layout = MapLayout.build([0, 2, 4])
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.unit_offsets.device.type == "cpu"
    assert layout.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1, 2, 3]], {}, ValueError, "cu_seqlens: expected cumulative counts that start at 0"),
        ([[0, 3, 2]], {}, ValueError, "cu_seqlens: .* got 2 after 3 at entry 2"),
        ([[0, 3]], {}, ValueError, "multiple of segments=2"),
        ([[0.0, 3.0, 4.0]], {}, TypeError, "cu_seqlens: expected integers"),
        ([torch.tensor([0.0, 3.0, 4.0])], {}, TypeError, "cu_seqlens: expected integers, got dtype"),
        ([[]], {}, ValueError, "cu_seqlens"),
        ([[0, 3, 4]], {"segments": 0}, ValueError, "segments: expected a positive int"),
        ([[0, 3, 4]], {"teacher_cu_seqlens": [0, 3]}, ValueError, "teacher_cu_seqlens: expected 3 entries"),
        ([[0, 3, 4]], {"teacher_cu_seqlens": [0, 3, 5]}, ValueError, "teacher_unit_of_token: expected the unit"),
        ([[0, 3, 4]], {"cu_units": [0, 2, 3]}, ValueError, "unit_of_token: expected the unit of each token"),
        ([[0, 3, 4]], {"unit_of_token": [0, 1, 0, 2]}, ValueError, "unit_of_token: .* got 0 after 1 at token 2"),
        ([[0, 3, 4]], {"unit_of_token": [0, 1, 1]}, ValueError, "unit_of_token: expected 4 entries"),
        (
            [[0, 3, 4]],
            {"unit_of_token": [0, 2, 2, 3], "cu_units": [0, 3, 4]},
            ValueError,
            "unit_of_token: .* unit 1 has none",
        ),
        (
            [[0, 3, 4]],
            {"unit_of_token": [0, 1, 2, 2], "cu_units": [0, 2, 3]},
            ValueError,
            r"unit_of_token: expected a unit of segment 0 in \[0, 2\) at token 2, got 2",
        ),
        (
            [[0, 3, 4]],
            {"teacher_unit_of_token": [0, 0, 1, 3]},
            ValueError,
            "teacher_unit_of_token: .* unit 2 has none",
        ),
        ([[0, 3, 4]], {"unit_of_token": [-1, 0, 1, 2]}, ValueError, "unit_of_token: expected a unit of segment 0"),
        ([[0, 2, 4]], {"unit_of_token": [0, 1, 2, 10**13]}, ValueError, "unit_of_token: .* unit 3 has none"),
        ([torch.zeros(3, dtype=torch.int32, device="meta")], {}, TypeError, "on the host"),
        ([[0, 3, 4]], {"shared_prefix_lens": [1, 1]}, ValueError, "shared_prefix_lens: expected 1 entries, one an exa"),
        ([[0, 3, 4]], {"shared_prefix_lens": [0.5]}, TypeError, "shared_prefix_lens: expected integers"),
        (
            [[0, 2, 4, 7, 8]],
            {"shared_prefix_lens": [2, 2]},
            ValueError,
            r"shared_prefix_lens: expected a length in \[0, 1\], .* of example 1, got 2",
        ),
        ([[0, 3, 4]], {"shared_prefix_lens": [-1]}, ValueError, "shared_prefix_lens: expected a length in"),
        ([[0, 3]], {"segments": 1, "shared_prefix_lens": [4]}, ValueError, "shared_prefix_lens: expected a length in"),
        (
            [[0, 2, 4]],
            {"shared_prefix_lens": [1], "unit_of_token": [0, 1, 2, 2], "teacher_unit_of_token": [0, 1, 2, 2]},
            ValueError,
            "shared_prefix_lens: .* example 0 to end where a unit of segment 1 does, got 1 tokens, within .* 0 to 1",
        ),
        (
            [[0, 3, 6]],
            {
                "shared_prefix_lens": [3],
                "unit_of_token": [0, 0, 1, 2, 3, 3],
                "teacher_unit_of_token": [0, 0, 1, 2, 3, 3],
            },
            ValueError,
            r"shared_prefix_lens: expected the same units .* after \[2, 3\] and, in segment 1, \[1, 3\] tokens",
        ),
        ([4], {}, TypeError, "cu_seqlens: expected a list of ints or an integer tensor, got int"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        MapLayout.build(*arguments, **options)


def test_a_unit_of_two_segments_is_refused_when_units_are_counted():
    with pytest.raises(ValueError, match="unit_of_token"):
        MapLayout.build([0, 2, 4], unit_of_token=[0, 1, 1, 2])


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), [[True]]])
def test_from_mask_refuses(mask):
    with pytest.raises((TypeError, ValueError), match="mask: expected"):
        MapLayout.from_mask(mask)
