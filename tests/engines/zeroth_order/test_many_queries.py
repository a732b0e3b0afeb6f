"""Tens of probes in a step: hidden states that wait in host memory, the log, resuming."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from ranks import in_ranks
from torch import Tensor
from zeroth_order_runs import (
    KNOBS,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
)

from engines.costs import zo2 as costs
from engines.costs.mezo import hidden_state_bytes
from engines.methods.zo2 import Zo2
from engines.model.waiting_states import WaitingStates
from engines.noise.visits import LOG_CAPACITY
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Workload
from engines.transfer.link import Event, Link
from engines.world import World
from tiny_models import tiny_batches, tiny_blueprint

CPU = torch.device("cpu")
ESTIMATORS: dict[str, dict[str, object]] = {
    "n-spsa": {"queries": 5},
    "1.5-spsa": {"estimator": "1.5-spsa", "queries": 4, "noise": "binomial", "eps": 0.03},
    "fzoo": {"estimator": "fzoo", "queries": 5, "noise": "rademacher", "learning_rate": 1e-6},
    "int8": {"queries": 4, "base": "int8", "fold_every": 2},
}


class LateLink(Link):
    """Copies are made when they are waited for, or when another copy or the host's end of it comes too late
    for that: what is read or written before shows."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._due: list[tuple[LateEvent, Tensor, Tensor]] = []

    def _later(self, source: Tensor, out: Tensor, after: object) -> Event:
        wanted = [after] if isinstance(after, Event) else list(after or ())  # type: ignore[call-overload]
        event = LateEvent([each for each in wanted if isinstance(each, LateEvent)])
        self._due.append((event, source, out))
        return event

    def upload(self, host: Tensor, out: Tensor, after: object = None, name: str = "copy") -> Event:
        self.h2d_bytes += host.nbytes
        return self._later(host, out, after)

    def download(self, gpu: Tensor, out: Tensor, after: object = None, name: str = "copy") -> Event:
        self.d2h_bytes += gpu.nbytes
        return self._later(gpu, out, after)

    def wait(self, event: Event) -> None:
        if not isinstance(event, LateEvent) or event.done:
            return
        for earlier in event.after:
            self.wait(earlier)
        for found, source, out in self._due:
            if found is event:
                out.copy_(source)
        event.done = True


class LateEvent(Event):
    __slots__ = ("after", "done")

    def __init__(self, after: list[LateEvent]) -> None:
        super().__init__()
        self.after = after
        self.done = False


@pytest.mark.parametrize("staying", [0, 1, 3])
def test_what_is_put_is_what_is_taken_however_late_copies_are(staying: int) -> None:
    """Six states through five blocks; a state is overwritten as soon as it may be."""
    link = LateLink()
    states = WaitingStates(
        link, num_states=6, num_staying=staying, most_bytes=48, progress=lambda *told: None
    )
    states.begin()
    for number in range(6):  # a step that is broken off
        states.put(number, torch.full((12,), torch.nan))
    states.take(3)
    before = link.h2d_bytes, link.d2h_bytes
    for start in (0.0, 100.0):
        states.begin()
        for number in range(6):
            # The clean pass has one side, a state beyond the room stays.
            size = {0: 6, 4: 20}.get(number, 12)
            states.put(number, torch.full((size,), start + number))
        for block in range(5):
            for number in range(6):
                state = states.take(number)
                assert state.unique().tolist() == [start + number + 10 * block]
                states.put(number, state + 10)
                state.fill_(torch.nan)
        for number in (5, 0, 3, 1, 4, 2):
            assert states.take(number).unique().tolist() == [start + number + 50]
    away = [24 if number == 0 else 48 for number in range(staying, 6) if number != 4]
    moved = (link.h2d_bytes - before[0], link.d2h_bytes - before[1])
    assert moved == (2 * 6 * sum(away),) * 2
    states.close()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_states_on_the_host_change_no_bit(
    name: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, knobs = context(accumulation=accumulation), ESTIMATORS[name]
    blueprint = tiny_blueprint("opt")
    sizes = hidden_state_bytes(blueprint.shape, where.workload, MezoSettings(**knobs))  # type: ignore[arg-type]
    monkeypatch.setattr(costs, "STAYING_BYTES", 2 * max(sizes))
    mezo = make_mezo(tiny_blueprint("opt"), where, **knobs)
    here = make_zo2(tiny_blueprint("opt"), where, resident_blocks=1, **knobs)
    away = make_zo2(tiny_blueprint("opt"), where, resident_blocks=1, hidden_states="host", **knobs)
    assert isinstance(away.blocks.states, WaitingStates)
    batches = tiny_batches(4 * accumulation, "opt")
    told = assert_same_steps(mezo, away, batches, accumulation)
    held_out = tiny_batches(2, "opt", seed=5)
    assert away.evaluate(held_out) == mezo.evaluate(held_out)
    told += assert_same_steps(mezo, away, tiny_batches(2 * accumulation, "opt", seed=9), accumulation)
    assert_same_weights(mezo, away)
    plain = [here.step(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation)]
    more = [stats.h2d_bytes - other.h2d_bytes for stats, other in zip(told, plain, strict=False)]
    assert set(more) == {4 * sum(sizes[2:])}  # three blocks and the loss
    assert told[0].d2h_bytes - plain[0].d2h_bytes == 4 * sum(sizes[2:])
    away.close()
    here.close()


def test_as_many_queries_as_the_log_holds_are_replayed() -> None:
    settings = MezoSettings(**KNOBS, estimator="1.5-spsa", queries=LOG_CAPACITY, noise="binomial")
    mezo = make_mezo(tiny_blueprint("llama"), like=settings)
    streamed = make_zo2(tiny_blueprint("llama"), like=settings, hidden_states="host")
    told = assert_same_steps(mezo, streamed, tiny_batches(2, "llama"))
    assert {len(stats.updates) for stats in told} == {64}
    assert {stats.forwards for stats in told} == {129}
    updates = [update for stats in told for update in stats.updates]
    other = make_zo2(tiny_blueprint("llama"), like=settings)
    assert_replays(mezo, updates, [other])


def test_each_rank_has_its_own_states_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of one micro-batch, which divide the clean pass and the four queries."""
    monkeypatch.setattr(costs, "STAYING_BYTES", 0)
    settings = MezoSettings(**KNOBS, estimator="1.5-spsa", queries=4, noise="binomial")
    batches = tiny_batches(2, "opt")
    alone = make_mezo(tiny_blueprint("opt"), like=settings)
    expected = [alone.step([batch]).updates for batch in batches]

    def rank(world: World) -> list[object]:
        where = replace(context(), world=world)
        made = make_zo2(tiny_blueprint("opt"), where, like=settings, hidden_states="host")
        assert isinstance(made.blocks.states, WaitingStates)
        found: list[object] = [made.step([batch]).updates for batch in batches]
        made.close()
        return found

    assert in_ranks(2, rank) == [expected, expected]


def test_what_stays_is_bounded_by_its_bytes() -> None:
    shape = tiny_blueprint("opt").shape
    workload = Workload(batch_size=1, seq_len=16, dtype="fp16")
    settings = Zo2Settings(queries=3, estimator="1.5-spsa")
    one = 16 * shape.hidden * 2
    assert hidden_state_bytes(shape, workload, settings) == [one, 2 * one, 2 * one, 2 * one]
    assert costs.num_staying([one, 2 * one]) == 2
    assert costs.num_staying([costs.STAYING_BYTES // 2] * 5) == 2
    assert costs.num_staying([costs.STAYING_BYTES + 1] * 5) == 0


@pytest.mark.gpu
def test_late_copies_of_states_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "STAYING_BYTES", 4000)
    where = context("cuda:0", "bf16", accumulation=2)
    knobs = {**KNOBS, "estimator": "1.5-spsa", "queries": 6, "eps": 0.03, "noise": "binomial"}
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
        delays = random.Random(1)
        mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where, **knobs)
        streamed = Zo2(
            replace(Zo2Settings(**knobs), hidden_states="host", fold_every=2),  # type: ignore[arg-type]
            where,
        )
        streamed.link_delay = lambda: delays.choice((0, 0, 50_000, 300_000))  # noqa: B023
        streamed.setup(tiny_blueprint("opt", num_blocks=5))
        assert_same_steps(mezo, streamed, tiny_batches(60, "opt"), accumulation=2)
        assert_same_weights(mezo, streamed)
        streamed.close()
