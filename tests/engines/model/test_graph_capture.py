"""What is captured is computed by replays; what would spoil a capture waits, and what does is told."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from engines.model.graph_capture import capturing

pytestmark = pytest.mark.gpu


class Circle:
    """Garbage that only Python's collector finds, with memory that the driver has to be asked to free."""

    def __init__(self) -> None:
        self.itself = self
        self.memory = torch.empty(1 << 20, pin_memory=True)
        self.graph = torch.cuda.CUDAGraph()


@pytest.fixture
def eager_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def test_garbage_is_collected_after_a_capture_and_not_in_it(eager_collector: None) -> None:
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    values = torch.zeros(4, device="cuda")
    values.add_(1.0)
    circle = Circle()
    gone = weakref.ref(circle)
    with capturing(stream, pool) as graph:
        del circle
        made = [[index] for index in range(1000)]  # objects enough for a collection at each
        values.add_(1.0)
        assert gone() is not None
    assert made
    graph.replay()
    assert values.tolist() == [2.0] * 4
    assert gc.isenabled()
    gc.collect()
    assert gone() is None


def test_what_spoils_a_capture_is_raised_and_the_next_one_works() -> None:
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    values = torch.zeros(4, device="cuda")
    values.add_(1.0)

    def fail() -> None:
        with capturing(stream, pool):
            values.add_(1.0)
            raise ValueError("a cause")

    with pytest.raises(ValueError, match="a cause"):
        fail()
    assert gc.isenabled()
    with capturing(stream, torch.cuda.graph_pool_handle()) as graph:
        values.add_(1.0)
    graph.replay()
    assert values.tolist() == [2.0] * 4
