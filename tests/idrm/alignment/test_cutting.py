import pytest
from hypothesis import given
from hypothesis import strategies as st

from idrm.alignment.cutting import cut_each, cut_together, lengths_within, remaining_tokens, shared_cuts


def test_remaining_tokens_after_each_unit():
    # header, unit 0 (two tokens around white space), header, unit 1, unit 2, end of turn
    assert remaining_tokens([-1, 0, -1, 0, -1, 1, 2, -1], 3) == [8, 4, 2, 1]
    assert remaining_tokens([], 0) == [0]
    assert remaining_tokens([-1, -1], 0) == [2]


def test_shared_cuts_are_where_units_of_both_segments_start():
    assert shared_cuts([[0, 3, 5, 8, 9], [0, 2, 3, 8]], [3, 3]) == [(0, 0), (1, 2), (3, 3)]
    assert shared_cuts([[0, 4], [0, 4]], [0, 0]) == [(0, 0), (0, 0)]


def test_both_segments_lose_the_same_prompt_units():
    remaining = [[10, 9, 8, 3], [14, 13, 12, 7]]
    shared = shared_cuts([[0, 1, 2], [0, 1, 2]], [2, 2])
    assert cut_each(remaining, shared, 14) == (0, 0)
    assert cut_each(remaining, shared, 13) == (1, 1)
    assert cut_each(remaining, shared, 12) == (2, 2)
    assert cut_each(remaining, shared, 7) == (3, 3)
    assert cut_each(remaining, shared, 8) == (2, 3)
    assert cut_each(remaining, shared, 2) == (3, 3)


def test_different_prompts_are_cut_each_as_far_as_needed():
    remaining = [[10, 9, 8, 3], [14, 13, 12, 7]]
    assert cut_each(remaining, None, 9) == (1, 3)


def test_a_joint_input_loses_prompts_alike_and_the_longer_response_first():
    remaining = [[6, 5, 4, 2, 1, 0], [9, 8, 7, 6, 5, 0]]
    shared = shared_cuts([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], [2, 2])
    assert cut_together(remaining, [2, 2], shared, 15) == (0, 0)
    assert cut_together(remaining, [2, 2], shared, 14) == (1, 1)
    assert cut_together(remaining, [2, 2], shared, 11) == (2, 2)
    assert cut_together(remaining, [2, 2], shared, 10) == (2, 3)
    assert cut_together(remaining, [2, 2], shared, 8) == (2, 5)
    assert cut_together(remaining, [2, 2], shared, 0) == (5, 5)


def test_a_joint_input_loses_the_longer_of_two_different_prompts_first():
    remaining = [[10, 6, 2], [5, 4, 2]]
    assert cut_together(remaining, [1, 1], None, 14) == (1, 0)
    assert cut_together(remaining, [1, 1], None, 10) == (1, 1)
    assert cut_together(remaining, [1, 1], None, 9) == (2, 1)


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [((3, 4), 7, (3, 4)), ((3, 9), 7, (3, 4)), ((9, 3), 7, (4, 3)), ((9, 9), 7, (4, 3)), ((9, 9), 0, (0, 0))],
)
def test_the_longer_text_yields(lengths, limit, expected):
    assert lengths_within(lengths, limit) == expected


@st.composite
def _segments(draw):
    """Two segments with equal or different prompts: token counts of their units, then what stands outside units."""
    prompt = draw(st.lists(st.integers(1, 4), max_size=6))
    prompts = [prompt, prompt if draw(st.booleans()) else draw(st.lists(st.integers(1, 4), max_size=6))]
    responses = [draw(st.lists(st.integers(1, 4), max_size=6)) for _ in range(2)]
    tails = [draw(st.integers(0, 3)) for _ in range(2)]
    remaining, starts = [], []
    for own_prompt, response, tail in zip(prompts, responses, tails, strict=True):
        sizes = own_prompt + response
        remaining.append([sum(sizes[unit:]) + tail for unit in range(len(sizes) + 1)])
        starts.append([sum(sizes[:unit]) for unit in range(len(sizes))])
    prompt_units = [len(own_prompt) for own_prompt in prompts]
    shared = shared_cuts(starts, prompt_units) if prompts[0] == prompts[1] else None
    return remaining, prompt_units, shared


@given(segments=_segments(), limit=st.integers(0, 40))
def test_each_segment_fits_and_loses_no_unit_without_need(segments, limit):
    remaining, prompt_units, shared = segments
    cut = cut_each(remaining, shared, limit)
    for left, units, prompt in zip(remaining, cut, prompt_units, strict=True):
        assert left[units] <= limit or units == len(left) - 1
        if units > prompt or (shared is None and units):
            assert left[units - 1] > limit
    if shared is not None:
        prompt_cuts = [min(units, prompt) for units, prompt in zip(cut, prompt_units, strict=True)]
        assert prompt_cuts[0] == prompt_cuts[1]
        before = max(prompt_cuts[0] - 1, 0)
        assert prompt_cuts[0] == 0 or any(left[before] > limit for left in remaining)


@given(segments=_segments(), limit=st.integers(0, 60))
def test_a_joint_input_fits_and_loses_responses_last(segments, limit):
    remaining, prompt_units, shared = segments
    cut = cut_together(remaining, prompt_units, shared, limit)
    length = sum(left[units] for left, units in zip(remaining, cut, strict=True))
    gone = all(units == len(left) - 1 for left, units in zip(remaining, cut, strict=True))
    assert length <= limit or gone
    if any(units > prompt for units, prompt in zip(cut, prompt_units, strict=True)):
        assert all(units >= prompt for units, prompt in zip(cut, prompt_units, strict=True))
    elif shared is not None:
        assert cut[0] == cut[1]
        assert cut == (0, 0) or sum(left[cut[0] - 1] for left in remaining) > limit
