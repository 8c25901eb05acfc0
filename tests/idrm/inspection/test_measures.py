"""The measures of single maps whose values are known."""

import math

import pytest
import torch

from idrm.inspection.measures import BlockMeasures, PairMeasures, PairUnits

UNITS = PairUnits(
    segments=(range(5), range(5, 9)),
    responses=(range(2, 5), range(8, 9)),
    sizes=torch.tensor([1, 1, 2, 1, 1, 1, 1, 1, 3]).double(),
)


def each_segment(row):
    """The same row for all units, summing to 1 within each segment."""
    row = torch.as_tensor(row).double()
    return torch.cat([row[:5] / row[:5].sum(), row[5:] / row[5:].sum()]).expand(9, 9)


def measured(block, joint=None, units=UNITS, first=None):
    return BlockMeasures.summary([PairMeasures.of(block / 2 if joint is None else joint, block, units, first)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_map_has_no_structure(dtype):
    block = each_segment(UNITS.sizes).to(dtype)
    joint = (UNITS.sizes / UNITS.sizes.sum()).expand(9, 9).to(dtype)
    found = measured(block, joint)
    for structure in (found.intra, found.inter, found.responses):
        assert vars(structure) == dict.fromkeys(vars(structure), 0.0)
    assert found.crossing.ratio == pytest.approx(1, abs=1e-6)
    assert found.response_crossing.ratio == pytest.approx(1, abs=1e-6)
    assert found.crossing.share == pytest.approx((5 * 6 / 12 + 4 * 6 / 12) / 9)
    assert found.response_crossing.share == pytest.approx((3 * 3 / 12 + 1 * 4 / 12) / 4)


def test_hub_keys_alone_are_not_row_specific():
    found = measured(each_segment([9, 1, 1, 1, 1, 1, 1, 1, 9]))
    for structure in (found.intra, found.inter, found.responses):
        assert structure.row_specific_share == pytest.approx(0, abs=1e-12)
        assert structure.distance > 0.3
    assert found.intra.moved == pytest.approx(
        (5 * 0.5 * (9 / 13 - 1 / 6 + 4 / 6 - 3 / 13 + 1 / 6 - 1 / 13) + 4 * 0.25) / 9
    )


def test_a_diagonal_map_is_row_specific():
    size = 40
    units = PairUnits(
        (range(size), range(size, 2 * size)), (range(0), range(size, size)), torch.ones(2 * size).double()
    )
    found = measured(torch.eye(size).repeat(2, 2), units=units)
    for structure in (found.intra, found.inter):
        assert structure.row_specific_share == pytest.approx(1, abs=1e-6)
        assert structure.moved == pytest.approx(1 - 1 / size)
        assert structure.distance == pytest.approx(2 * math.sqrt(size - 1))
        assert structure.row_specific_distance == pytest.approx(2 * math.sqrt(size - 1))
    assert found.crossing.ratio == pytest.approx(1)
    assert found.response_crossing.ratio is None
    assert found.responses.distance == 0


def test_hub_and_row_specific_squares_add_up():
    torch.manual_seed(0)
    block = torch.rand(9, 9).double() ** 3
    block = torch.cat(
        [block[:, :5] / block[:, :5].sum(1, keepdim=True), block[:, 5:] / block[:, 5:].sum(1, keepdim=True)], 1
    )
    uniform = each_segment(UNITS.sizes)
    found = measured(block)
    squares = hub = 0.0
    for rows, keys in ((slice(0, 5), slice(5, 9)), (slice(5, 9), slice(0, 5))):
        part = block[rows, keys]
        squares += (part - uniform[rows, keys]).square().sum()
        hub += len(part) * (part.mean(0) - uniform[0, keys]).square().sum()
    assert found.inter.row_specific_share == pytest.approx((1 - hub / squares).item(), abs=1e-12)
    assert 0.2 < found.inter.row_specific_share < 0.98


def test_only_the_rows_that_count_are_looked_at():
    block = each_segment(UNITS.sizes).clone()
    block[:2, :5] = torch.tensor([1.0, 0, 0, 0, 0])
    joint = block / 2
    joint[5:8] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0])
    responses = PairUnits(UNITS.segments, UNITS.responses, UNITS.sizes, rows="response")
    assert measured(block, joint).intra.distance > 1
    assert measured(block, joint, responses).intra.distance == 0
    assert measured(block, joint).crossing.share == pytest.approx((6 * 0.5 + 3) / 9)
    assert measured(block, joint, responses).crossing.share == pytest.approx(0.5)


def test_the_distance_to_another_map_is_a_sum_over_blocks():
    first, block = each_segment([9, 1, 1, 1, 1, 1, 1, 1, 9]), each_segment([1] * 9)
    expected = sum(
        (first - block)[rows, keys].square().sum().sqrt().item()
        for rows in (slice(0, 5), slice(5, 9))
        for keys in (slice(0, 5), slice(5, 9))
    )
    assert measured(block, first=first).distance_to_first == pytest.approx(expected)
    assert measured(block, first=block).distance_to_first == 0
    assert measured(block).distance_to_first is None


def test_empty_segments_are_legal():
    units = PairUnits((range(3), range(3, 3)), (range(1, 3), range(3, 3)), torch.ones(3).double())
    found = measured(torch.eye(3), units=units)
    assert found.intra.distance == pytest.approx(math.sqrt(2))
    assert found.inter.distance == 0
    assert found.crossing.ratio is None
    # Beside a pair that has both segments, it counts as 0 in distances, as in training, and not in means over rows.
    other = PairMeasures.of(each_segment([1] * 9) / 2, each_segment([9, 1, 1, 1, 1, 1, 1, 1, 9]), UNITS)
    both = BlockMeasures.summary([PairMeasures.of(torch.eye(3), torch.eye(3), units), other])
    assert both.inter.distance == pytest.approx(other.inter.distance / 2)
    assert both.inter.moved == pytest.approx(other.inter.moved / 9)
    assert both.crossing == other.crossing
