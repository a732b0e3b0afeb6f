"""The hidden states of a zeroth-order step: of every probe (`engines.zeroth_order.estimators`) and every
micro-batch.

A block is visited once, for all of them: the first probe's perturbed weights are made in the same pass that
applies the deferred updates, the next one's then take their place in the scratch. So several queries share
one trip over the link, and cost hidden states, noise and forward passes. Where the updates are not stored, as
between two roundings of a low-bit base, each of them applies them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engines.errors import NonFiniteLoss
from engines.model.blocks import BlockCall
from engines.model.waiting_states import States
from engines.noise.visits import Visit
from engines.world import Share, World
from engines.zeroth_order.block_visit import Source, Task, without_updates
from engines.zeroth_order.estimators import Probe, Side
from engines.zeroth_order.perturbed_model import PerturbedModel, Prepared

MOST_TOLD = 8
"""Losses of a step that a message names."""


class LossSums:
    """Sums of the losses of all passes over micro-batches, on the device until they are read.

    In fp64: g is a small difference of them, divided by a small number.
    """

    def __init__(self, device: torch.device, passes: int) -> None:
        self._sums = torch.zeros(passes, dtype=torch.float64, device=device)

    def add(self, losses: Sequence[Tensor]) -> None:
        self._sums += torch.stack(tuple(losses))

    def read(self, count: int, step: int) -> list[float]:
        """Mean losses of `count` micro-batches. Waits for the compute stream.

        Raises `NonFiniteLoss`.
        """
        losses: list[float] = (self._sums / count).tolist()
        return _finite(losses, step)


def _finite(losses: list[float], step: int) -> list[float]:
    """`losses`. Raises `NonFiniteLoss` where one is not."""
    if not all(map(math.isfinite, losses)):
        bad = next(loss for loss in losses if not math.isfinite(loss))
        good = next((loss for loss in losses if math.isfinite(loss)), bad)
        if len(losses) > MOST_TOLD:
            raise NonFiniteLoss(f"{bad} is among the {len(losses)} losses of step {step}", losses=(good, bad))
        told = ", ".join(map(str, losses[:-1]))
        raise NonFiniteLoss(f"the losses of step {step} are {told} and {losses[-1]}", losses=(good, bad))
    return losses


def mean_over_ranks(
    own: Tensor, world: World, division: Sequence[Share], sides: Sequence[int], step: int
) -> list[float]:
    """Mean losses over all micro-batches, of every side of every probe, on every rank: the bits of
    `LossSums.read` in one process. As `each_over_ranks` otherwise."""
    losses = each_over_ranks(own, world, division, sides, step)
    sums = [0.0] * len(losses[0])
    for of_batch in losses:  # in the order in which one process adds them
        sums = [total + loss for total, loss in zip(sums, of_batch, strict=True)]
    return [total / len(losses) for total in sums]


def each_over_ranks(
    own: Tensor, world: World, division: Sequence[Share], sides: Sequence[int], step: int
) -> list[list[float]]:
    """Losses of every micro-batch, of every side of every probe, on every rank.

    `own`: (micro-batches, sides) fp64, this rank's share by `division`. `sides`: of each probe how many there
    are. Waits for the compute stream, then for the other ranks, to which 8 bytes a loss are sent.
    Raises `NonFiniteLoss` and `PeerLost`.
    """
    first_side = [sum(sides[:number]) for number in range(len(sides) + 1)]
    columns = [range(first_side[each.probes.start], first_side[each.probes.stop]) for each in division]
    width = max(len(each.batches) * len(sides) for each, sides in zip(division, columns, strict=True))
    values: list[float] = own.flatten().tolist()
    found = world.gather([*values, *([0.0] * (width - len(values)))])
    count = max(each.batches.stop for each in division)
    losses = [[0.0] * first_side[-1] for _ in range(count)]
    for each, sides_of, row in zip(division, columns, found, strict=True):
        for number, batch in enumerate(each.batches):
            start = number * len(sides_of)
            losses[batch][sides_of.start : sides_of.stop] = row[start : start + len(sides_of)]
    _finite([loss for of_batch in losses for loss in of_batch], step)
    return losses


class ForwardPasses:
    """All forward passes of a step: from the model's entrance to its losses, block by block."""

    def __init__(
        self,
        model: PerturbedModel,
        batches: Sequence[Prepared],
        probes: Sequence[Probe],
        how: Visit,
        states: States,
    ) -> None:
        """`states` keeps the hidden states between blocks, those of the first probe first."""
        self._model = model
        self._batches = batches
        self._probes = probes
        self._how = how
        model.begin_step(len(batches), most_sides=max(len(probe.sides) for probe in probes))
        self._states = states
        states.begin()
        self._calls: list[list[Sequence[BlockCall]]] = []
        for number, probe in enumerate(probes):
            hidden, calls = model.enter_all(batches, self._of(probe), probe.sides)
            for i in range(len(batches)):
                states.put(self._place(number, i), hidden[i])
            self._calls.append(calls)

    def _place(self, probe: int, batch: int) -> int:
        return probe * len(self._batches) + batch

    def _of(self, probe: Probe) -> Visit:
        return replace(self._how, step=probe.draw)

    def visit(self, index: int, task: Task, source: Source) -> None:
        """All passes through block `index`. `task` tells deferred updates and whether they are stored."""
        for number, probe in enumerate(self._probes):
            last = number == len(self._probes) - 1
            how = without_updates(task.how) if number > 0 and task.store else task.how
            each = replace(
                task,
                how=replace(how, step=probe.draw),
                store=task.store and number == 0,
                ends_window=task.ends_window if number == 0 else None,
                roundings=task.roundings if number == 0 else (),
                perturb=task.perturb and probe.sides != (Side.PLAIN,),
                plus_only=len(probe.sides) == 1,
            )
            states, calls = self._states, self._calls[number]
            with self._model.visiting(index, each, source if last else _Held(source)):
                for i, call in enumerate(calls):
                    place, examples = self._place(number, i), self._batches[i].examples
                    states.put(place, self._model.run(index, call, states.take(place), examples))

    def losses(self) -> LossSums:
        """Of every side of every probe, over the micro-batches."""
        passes = sum(len(probe.sides) for probe in self._probes)
        sums: LossSums | None = None
        for losses in self._by_batch():
            sums = sums or LossSums(losses[0].device, passes)
            sums.add(losses)
        assert sums is not None
        return sums

    def each_loss(self) -> Tensor:
        """Of every micro-batch and every side of every probe, or of every example: (micro-batches, losses)
        fp64 on the device."""
        return torch.stack([torch.stack(tuple(losses)).double() for losses in self._by_batch()])

    def _by_batch(self) -> Iterator[Sequence[Tensor]]:
        for i, batch in enumerate(self._batches):
            losses: list[Tensor] = []
            for number, probe in enumerate(self._probes):
                hidden = self._states.take(self._place(number, i))
                losses += self._model.losses(batch, hidden, self._of(probe), probe.sides)
            yield losses


class _Held:
    """A source whose parts are read again in this visit, so they are not done yet."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def spans(self, block: int) -> Sequence[tuple[int, int]]:
        return self._source.spans(block)

    def take(self, block: int, first: int, last: int) -> Tensor:
        return self._source.take(block, first, last)

    def done(self, block: int, first: int, last: int) -> None:
        pass
