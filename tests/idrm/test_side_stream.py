"""Work on a stream of its own."""

import pytest
import torch

from idrm.side_stream import SideStream


def test_without_streams_work_is_done_at_once():
    done = []
    finish = SideStream().start(torch.device("cpu"), lambda: done.append(1) or len(done))
    assert done == [1]
    assert finish() == finish() == 1


def test_an_error_shows_where_the_work_is_started():
    with pytest.raises(ZeroDivisionError):
        SideStream().start(torch.device("cpu"), lambda: 1 / 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's streams")
def test_work_runs_beside_what_follows_and_sees_what_came_before():
    device = torch.device("cuda", torch.cuda.current_device())
    stream, streams = SideStream(), []

    def work(values):
        streams.append(torch.cuda.current_stream(device))
        return (values @ values).sum()

    for step in range(20):
        values = torch.full((2048, 2048), float(step), device=device)
        finish = stream.start(device, lambda values=values: work(values))
        other = values + 1
        result = finish() + other[0, 0]
        assert result.item() == pytest.approx(2048.0**3 * step**2 + step + 1, rel=1e-4)
    assert set(streams) != {torch.cuda.current_stream(device)}
    assert len(set(streams)) == 1
