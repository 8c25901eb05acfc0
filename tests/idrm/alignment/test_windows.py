"""Windows over two segments: every token in one of them, none too long."""

from hypothesis import given
from hypothesis import strategies as st

from idrm.alignment.windows import divide_into_windows


@given(lengths=st.tuples(st.integers(0, 90), st.integers(0, 90)), limit=st.integers(5, 60))
def test_every_token_belongs_to_a_window_that_holds_it(lengths, limit):
    divided = divide_into_windows(lengths, limit)
    assert sum(windows.size for windows in divided) <= limit
    assert len(divided[0].starts) == len(divided[1].starts)
    if sum(lengths) <= limit:
        assert len(divided[0].starts) == 1
    for windows, length in zip(divided, lengths, strict=True):
        assert windows.starts[0] == 0
        assert windows.starts[-1] + windows.size == length
        owners = windows.owners()
        assert owners == sorted(owners)
        for token, window in enumerate(owners):
            assert token in range(length)[windows.stretch(window)]


def test_a_token_belongs_to_the_window_in_which_it_stands_farthest_from_an_edge():
    divided = divide_into_windows((400, 200), 300)
    for windows, length in zip(divided, (400, 200), strict=True):
        assert windows.size == length // 2
        for token, owner in enumerate(windows.owners()):
            margins = []
            for start in windows.starts:
                end = start + windows.size
                left = length if start == 0 else token - start
                right = length if end == length else end - 1 - token
                margins.append(min(left, right) if start <= token < end else -1)
            assert margins[owner] >= max(margins) - 1


def test_a_short_segment_keeps_a_quarter_of_the_room_or_all_it_has():
    chosen, rejected = divide_into_windows((1000, 20), 100)
    assert (chosen.size, rejected.size) == (80, 20)
    chosen, rejected = divide_into_windows((60, 1000), 100)
    assert (chosen.size, rejected.size) == (25, 75)
