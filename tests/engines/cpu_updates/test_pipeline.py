"""The way of a chunk through the pipeline: in which order, and that nobody waits for ever when it fails."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import Context
from engines.cpu_updates.chunks import ChunkUpdate, UpdateStep, UploadTarget
from engines.cpu_updates.pipeline import UpdatePipeline
from engines.shapes import Workload
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.engine_clocks import Clocks
from engines.transfer.link import Event, Link

CPU = torch.device("cpu")
STEP = UpdateStep(number=0, learning_rate=0.5)


@dataclass
class Chunk:
    """Of a toy optimizer that takes the learning rate off."""

    deadline: int
    on_update: Callable[[int], None] = lambda _: None
    number: int = 0
    updates: int = 0
    squared_norm: Tensor = field(default_factory=lambda: torch.ones(1))
    outgoing: Tensor = field(default_factory=lambda: torch.zeros(4))

    def update(self, step: UpdateStep, gradients: Sequence[Tensor] = ()) -> None:
        self.on_update(self.deadline)
        self.outgoing -= step.learning_rate
        self.updates += 1


class Download:
    """In the place of an event of CUDA: has happened when it is said to have."""

    def __init__(self, fails: bool = False) -> None:
        self.over = threading.Event()
        self._fails = fails

    def query(self) -> bool:
        if self._fails:
            raise RuntimeError("an illegal memory access was encountered")
        return self.over.is_set()

    def synchronize(self) -> None:
        self.over.wait(30)


@pytest.fixture
def pipeline() -> Iterator[UpdatePipeline]:
    workload = Workload(batch_size=1, seq_len=8, dtype="fp32")
    clocks = Clocks(Context(device="cpu", workload=workload, seed=7, total_steps=10), CPU)
    made = UpdatePipeline(Link(CPU), clocks, slots=1, slot_elements=4, name="pipeline-test")
    yield made
    made.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("pipeline-test")]


def an_update(chunk: Chunk, download: Any = None, **changes: Any) -> ChunkUpdate:
    target = UploadTarget(memory=torch.full((4,), 9.0), free=Event())
    of: dict[str, Any] = {"state": chunk, "step": STEP, "destination": target, **changes}
    return ChunkUpdate(**of) if download is None else ChunkUpdate(**of, downloaded=Event(download))


def test_what_was_updated_is_where_it_belongs_once_it_was_waited_for(pipeline: UpdatePipeline) -> None:
    applied: list[Tensor] = []
    updates = [
        an_update(Chunk(0)),
        an_update(Chunk(1), destination=lambda direction, step: applied.append(direction.clone())),
        an_update(Chunk(2), destination=None),
    ]
    pipeline.submit(updates)
    for update in updates:
        pipeline.wait(update)
    assert isinstance(updates[0].destination, UploadTarget)
    assert updates[0].destination.memory.tolist() == [-0.5] * 4
    assert [each.tolist() for each in applied] == [[-0.5] * 4]
    assert [update.state.updates for update in updates] == [1, 1, 1]


def test_updates_run_on_the_threads_that_are_chosen(
    pipeline: UpdatePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    for count in (1, 3, 2):
        monkeypatch.setattr(pipeline.adam_threads, "count", count)
        update = an_update(Chunk(0, lambda _: found.append(torch.get_num_threads())))
        pipeline.submit([update])
        pipeline.wait(update)
    assert found == [1, 3, 2]


@pytest.mark.parametrize("ends", [(0, 1), (1, 0)])
def test_threads_get_the_interpreters_lock_soon_while_it_lives(ends: tuple[int, int]) -> None:
    """Of two, whichever ends first, the interval of before is there in the end."""
    found, before = sys.getswitchinterval(), 0.004
    sys.setswitchinterval(before)
    workload = Workload(batch_size=1, seq_len=8, dtype="fp32")
    clocks = Clocks(Context(device="cpu", workload=workload, seed=7, total_steps=10), CPU)
    made = [
        UpdatePipeline(Link(CPU), clocks, slots=1, slot_elements=4, name="pipeline-test") for _ in range(2)
    ]
    assert sys.getswitchinterval() < before
    for each in ends:
        made[each].close()
    assert sys.getswitchinterval() == before
    sys.setswitchinterval(found)


def test_of_what_has_arrived_the_earliest_deadline_is_next(pipeline: UpdatePipeline) -> None:
    """Blocks arrive in the order of the backward pass, and are wanted in that of the next forward pass."""
    order: queue.SimpleQueue[int] = queue.SimpleQueue()
    begun, go_on = threading.Event(), threading.Event()

    def hold(deadline: int) -> None:
        begun.set()
        go_on.wait(30)
        order.put(deadline)

    first = an_update(Chunk(9, hold))
    pipeline.submit([first])
    assert begun.wait(30)
    later = [an_update(Chunk(deadline, order.put)) for deadline in (7, 3, 5)]
    for update in later:
        pipeline.submit([update])
    go_on.set()
    for update in (first, *later):
        pipeline.wait(update)
    assert [order.get(timeout=1) for _ in range(4)] == [9, 3, 5, 7]


def test_what_has_not_arrived_holds_up_nothing_that_has(pipeline: UpdatePipeline) -> None:
    late = Download()
    here, there = an_update(Chunk(5)), an_update(Chunk(0), late)
    pipeline.submit([here])
    pipeline.submit([there])
    pipeline.wait(here)
    assert not there.done.is_set()
    late.over.set()
    pipeline.wait(there)


def test_of_several_each_is_a_job_by_itself(pipeline: UpdatePipeline) -> None:
    """The first is back before the second has arrived, which a job of both would wait for."""
    late = Download()
    here, there = an_update(Chunk(1)), an_update(Chunk(1), late)
    pipeline.submit_each([here, there])
    pipeline.wait(here)
    assert not there.done.is_set()
    late.over.set()
    pipeline.wait(there)
    pipeline.submit_each([])


def test_waiting_for_several_stops_the_clock_once(
    pipeline: UpdatePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = ComputeClock(CPU), list[str]()
    clock.start()
    for name in ("stop", "start"):
        monkeypatch.setattr(clock, name, partial(told.append, name))
    updates = [an_update(Chunk(number)) for number in range(3)]
    pipeline.submit_each(updates)
    pipeline.compute_waits(updates, clock)
    assert all(update.done.is_set() for update in updates)
    assert told == ["stop", "start"]
    pipeline.compute_waits([], clock)
    assert told == ["stop", "start"]


def test_memory_is_given_back_whatever_comes_of_an_update(pipeline: UpdatePipeline) -> None:
    """Also after a failure, or the thread that runs backward would wait for ever."""
    given: queue.SimpleQueue[int] = queue.SimpleQueue()

    def fail(_: int) -> None:
        raise ValueError("no gradient")

    for number in range(2):
        update = an_update(Chunk(0, fail), consumed=lambda number=number: given.put(number))
        pipeline.submit([update])
        with pytest.raises(RuntimeError, match="the CPU update failed"):
            pipeline.wait(update)
    assert [given.get(timeout=1), given.get(timeout=1)] == [0, 1]


def test_an_error_of_the_driver_releases_who_waits_at_once(pipeline: UpdatePipeline) -> None:
    for _ in range(2):
        update = an_update(Chunk(0), Download(fails=True))
        pipeline.submit([update])
        with pytest.raises(RuntimeError, match="illegal memory access"):
            pipeline.wait(update)
