"""What becomes of updates that are on their way, and of all others when one of them fails."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from engines.base import Context
from engines.cpu_updates.chunks import ChunkUpdate, UpdateStep, UploadTarget, update_at_once
from engines.cpu_updates.pipeline import UpdatePipeline
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.errors import NonFiniteLoss
from engines.settings.lsp import LspSettings
from engines.shapes import Workload
from engines.subspace.cores import CoreState
from engines.transfer.engine_clocks import Clocks
from engines.transfer.link import Event, Link

CPU = torch.device("cpu")
BLOCKS = 3


@pytest.fixture(params=["behind the computation", "as the twin does"])
def in_flight(request: pytest.FixtureRequest) -> Iterator[tuple[UpdatesInFlight, UpdatePipeline | None]]:
    workload = Workload(batch_size=1, seq_len=8, dtype="fp32")
    clocks = Clocks(Context(device="cpu", workload=workload, seed=7, total_steps=10), CPU)
    link = Link(CPU)
    pipeline = UpdatePipeline(link, clocks) if request.param.startswith("behind") else None
    made = UpdatesInFlight(link, clocks.compute)
    made.set_up(BLOCKS, pipeline)
    yield made, pipeline
    made.clear()
    if pipeline is not None:
        pipeline.close()


def an_update(gradient: float) -> ChunkUpdate:
    state = CoreState(
        deadline=0, number=0, incoming=torch.full((8,), gradient), outgoing=torch.ones(8),
        moment=torch.zeros(8), variance=torch.zeros(8), squared_norm=torch.full((1,), 8 * gradient**2),
        settings=LspSettings(), key=0,
    )  # fmt: skip
    return ChunkUpdate(
        state=state,
        step=UpdateStep(number=4, learning_rate=1e-3),
        destination=UploadTarget(memory=torch.zeros(8), free=Event()),
    )


def submit(
    made: UpdatesInFlight, pipeline: UpdatePipeline | None, gradients: list[float]
) -> list[ChunkUpdate]:
    updates = [an_update(gradient) for gradient in gradients]
    for place, update in enumerate(updates):
        made.put(place, [update])
    if pipeline is None:
        update_at_once(updates, CPU)
    for update in updates if pipeline is not None else ():
        pipeline.submit([update])
    return updates


def uploaded(update: ChunkUpdate) -> bool:
    assert isinstance(update.destination, UploadTarget)
    return bool((update.destination.memory == update.state.outgoing).all())


def test_what_is_settled_has_been_uploaded_and_is_on_its_way_no_more(
    in_flight: tuple[UpdatesInFlight, UpdatePipeline | None],
) -> None:
    made, pipeline = in_flight
    updates = submit(made, pipeline, [1.0, -2.0, 3.0])
    made.settle(1)
    assert uploaded(updates[1])
    assert list(made.of(1)) == []
    assert made.all() == [updates[0], updates[2]]
    made.settle_all()
    assert all(map(uploaded, updates))
    assert not made.any()


def test_what_was_waited_for_stays_until_it_is_taken(
    in_flight: tuple[UpdatesInFlight, UpdatePipeline | None],
) -> None:
    made, pipeline = in_flight
    updates = submit(made, pipeline, [1.0, -2.0, 3.0])
    made.wait(2)
    assert made.take(2) == [updates[2]]
    assert made.take(2) == []
    made.synchronize()
    assert all(map(uploaded, updates))


def test_a_gradient_that_is_not_finite_is_told_and_the_others_are_waited_for(
    in_flight: tuple[UpdatesInFlight, UpdatePipeline | None],
) -> None:
    made, pipeline = in_flight
    updates = submit(made, pipeline, [1.0, math.nan, 3.0])
    with pytest.raises(NonFiniteLoss, match="step 4"):
        made.settle(1)
    if pipeline is not None:
        assert not made.any()
    made.discard()
    assert not made.any()
    assert uploaded(updates[0])
    assert not updates[1].state.moment.any()
