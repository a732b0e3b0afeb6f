"""Weights read ahead from disk: order, room, what is forgotten, what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from waited_for import until

from engines.errors import UserError
from engines.offload.disk_weights import DiskWeights
from engines.transfer.link import Event, Link

Make = Callable[..., tuple[DiskWeights, list[int]]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[DiskWeights] = []

    def start(
        places: int = 2, read: Callable[[int, Tensor], None] | None = None
    ) -> tuple[DiskWeights, list[int]]:
        order: list[int] = []

        def fill(block: int, memory: Tensor) -> None:
            order.append(block)
            memory.fill_(block)

        link = Link(torch.device("cpu"))
        made.append(DiskWeights(read or fill, 4096, places, link, lambda *_: None))
        return made[-1], order

    yield start
    for each in made:
        each.close()
    assert not [each for each in threading.enumerate() if each.name == "disk-weights"]


def taken(of: DiskWeights, block: int) -> set[int]:
    memory = of.take(block, wait=True)
    assert memory is not None
    return set(memory.tolist())


def test_what_is_wanted_first_is_read_first_and_no_more_than_there_is_room_for(make: Make) -> None:
    weights, order = make(places=2)
    weights.ahead([3, 4, 5, 6])
    until(lambda: order == [3, 4])
    for block in (3, 4, 5, 6):
        assert taken(weights, block) == {block}
        weights.sent(block, 4096, Event())
    assert order == [3, 4, 5, 6]
    assert weights.sent_bytes == 4 * 4096


def test_who_does_not_wait_comes_again(make: Make) -> None:
    weights, _ = make()
    assert weights.take(7, wait=False) is None
    until(lambda: weights.take(7, wait=False) is not None)


def test_what_nobody_came_for_makes_room(make: Make) -> None:
    weights, order = make(places=2)
    weights.ahead([1, 2])
    until(lambda: order == [1, 2])
    assert taken(weights, 9) == {9}


def test_what_has_changed_is_read_again(make: Make) -> None:
    weights, order = make()
    assert taken(weights, 1) == {1}
    weights.drop()
    assert taken(weights, 1) == {1}
    assert order == [1, 1]


def test_a_place_is_written_over_when_its_upload_has_ended(make: Make) -> None:
    ended = threading.Event()

    class Upload:
        def synchronize(self) -> None:
            assert ended.wait(60)

        def query(self) -> bool:
            return ended.is_set()

    weights, order = make(places=1)
    assert taken(weights, 1) == {1}
    weights.sent(1, 4096, Event(Upload()))  # type: ignore[arg-type]
    weights.ahead([2])
    time.sleep(0.05)
    assert order == [1]
    ended.set()
    assert taken(weights, 2) == {2}


@pytest.mark.parametrize(
    ("failure", "told"),
    [(UserError("the disk", "cannot be read", "use another"), "cannot be read"), (ValueError("odd"), "odd")],
)
def test_who_waits_is_told_what_failed(make: Make, failure: Exception, told: str) -> None:
    def fail(block: int, memory: Tensor) -> None:
        raise failure

    weights, _ = make(read=fail)
    with pytest.raises(UserError, match=told):
        weights.take(0, wait=True)
