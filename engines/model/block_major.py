"""Forward and backward of a step's micro-batches, block by block: all of them pass a block before any passes
the next one.

The gradients of a block are complete when the backward passes of all micro-batches have left it, long before
the step's end, and what is done with them has the rest of the step to itself. (GreedySnake, 2512.17570, calls
it the vertical order. With micro-batches one after the other only the last backward pass would be left.) The
gradients of one block at a time are there, however many micro-batches there are.

Between two blocks the hidden states of all micro-batches are kept, as activation checkpointing does; a block
is run again in its backward pass (1604.06174), or keeps its activations. Outside the blocks the model's own
forward runs, one micro-batch at a time, so that one micro-batch's logits are there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.base import Batch
from engines.model.activation_checkpointing import draws_random_numbers
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import BlockCall, BlockDriver, to_device
from engines.model.cuda_graphs import replaced, tensors_of


class Watcher(Protocol):
    """Told of the blocks' passes, by index."""

    def before_forward(self, index: int) -> None:
        """The block's weights are about to be used."""

    def before_backward(self, index: int) -> None:
        """They are again, and its gradients are about to be made."""

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        """One micro-batch's, of the block's own parameters in their order; `None`: it did not use one.
        `first`: of the first micro-batch in this step. They are summed elsewhere."""

    def after_backward(self, index: int) -> None:
        """All gradients of the block have been handed over."""


@dataclass(slots=True)
class _MicroBatch:
    inputs: dict[str, Tensor]
    padded: bool
    entering: Tensor
    """The hidden state before the first block, with the graph of what made it."""
    calls: Sequence[BlockCall]
    shared: list[tuple[Tensor, Tensor]]
    """Tensors that need gradients, and that blocks are called with, each with its place in `calls`."""
    hidden: list[Tensor]
    """Before each block so far, then after the last one."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """After each block that keeps its activations, with their graph."""
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    """What dropout drew from in each block that is run again."""
    gradient: Tensor | None = None
    """Of the hidden state where the backward pass is."""
    of_shared: list[Tensor | None] = field(default_factory=list)


class BlockMajor:
    """A model's training passes. Raises `UserError` for a model without a row of blocks."""

    def __init__(
        self,
        model: nn.Module,
        own: Sequence[Sequence[nn.Parameter]],
        watcher: Watcher,
        *,
        recomputed: int,
    ) -> None:
        """`own` are the parameters of each block that `watcher` gets the gradients of; those of other
        parameters are added to their `grad`. The first `recomputed` blocks are run again, the others keep
        activations."""
        self._model = model
        self._driver = BlockDriver(model)
        self._watcher = watcher
        self._own = [list(parameters) for parameters in own]
        self._others = [
            [p for p in block.parameters() if p.requires_grad and not _holds(mine, p)]
            for block, mine in zip(self._driver.blocks, self._own, strict=True)
        ]
        self._recomputed = recomputed
        self._draws = draws_random_numbers(model)
        self._knows_form = False

    def run(self, batches: Sequence[Batch], device: torch.device, told: Callable[[Tensor], None]) -> None:
        """Forward and backward of the mean loss of `batches`; nothing here waits for the GPU.

        `told` is called with that loss, fp32 on the device, before the backward passes of the blocks.
        """
        passing = [self._begin(batch, device) for batch in batches]
        for index in range(len(self._own)):
            self._watcher.before_forward(index)
            for each in passing:
                self._forward(index, each)
        losses = [self._turn(each, len(passing)) for each in passing]
        told(torch.stack(losses).sum())
        for index in reversed(range(len(self._own))):
            self._watcher.before_backward(index)
            for number, each in enumerate(passing):
                self._backward(index, each, first=number == 0)
            self._watcher.after_backward(index)
        for each in passing:
            self._end(each)

    def _begin(self, batch: Batch, device: torch.device) -> _MicroBatch:
        inputs = with_mask(to_device(batch, device))
        padded = has_padding(batch.inputs)
        with known_padding(padded):
            if not self._knows_form:
                self._watcher.before_forward(0)
                with torch.no_grad(), _random_state_kept(device if self._draws else None):
                    self._driver.learn_form(inputs)
                self._knows_form = True
            with torch.enable_grad():
                recording = self._driver.record(inputs)
        shared = [tensor for tensor in tensors_of(recording.calls) if tensor.requires_grad]
        calls, places = recording.calls, [tensor.detach().requires_grad_() for tensor in shared]
        if shared:
            swapped = {id(old): new for old, new in zip(shared, places, strict=True)}
            calls = replaced(calls, [swapped.get(id(each), each) for each in tensors_of(calls)])
        return _MicroBatch(
            inputs=inputs,
            padded=padded,
            entering=recording.hidden,
            calls=calls,
            shared=list(zip(shared, places, strict=True)),
            hidden=[recording.hidden.detach()],
            of_shared=[None] * len(shared),
        )

    def _forward(self, index: int, each: _MicroBatch) -> None:
        hidden = each.hidden[-1]
        if index < self._recomputed:
            if self._draws:
                each.states[index] = _random_state(hidden.device)
            with torch.no_grad():
                each.hidden.append(self._driver.run(index, each.calls[index], hidden))
            return
        hidden.requires_grad_()
        with torch.enable_grad():
            result = self._driver.run(index, each.calls[index], hidden)
        each.kept[index] = result
        each.hidden.append(result.detach())

    def _turn(self, each: _MicroBatch, count: int) -> Tensor:
        """The loss, and the gradient of the hidden state after the last block."""
        hidden = each.hidden.pop().requires_grad_()
        with torch.enable_grad(), known_padding(each.padded):
            loss = self._driver.finish(each.inputs, hidden).loss / count
        loss.backward()
        assert hidden.grad is not None
        each.gradient = hidden.grad
        share: Tensor = loss.detach().float()
        return share

    def _backward(self, index: int, each: _MicroBatch, *, first: bool) -> None:
        entering = each.hidden.pop()
        if index in each.kept:
            result = each.kept.pop(index)
        else:
            entering.requires_grad_()
            after = None
            if self._draws:
                after = _random_state(entering.device)
                _set_random_state(entering.device, each.states.pop(index))
            with torch.enable_grad():
                result = self._driver.run(index, each.calls[index], entering)
            if after is not None:
                _set_random_state(entering.device, after)
        own, others = self._own[index], self._others[index]
        places = [place for _, place in each.shared]
        assert each.gradient is not None
        found: Any = torch.autograd.grad(
            [result], [entering, *places, *others, *own], [each.gradient], allow_unused=True
        )
        each.gradient = found[0]
        for number, its in enumerate(found[1 : 1 + len(places)]):
            each.of_shared[number] = _sum(each.of_shared[number], its)
        for parameter, its in zip(others, found[1 + len(places) :][: len(others)], strict=True):
            parameter.grad = _sum(parameter.grad, its)
        self._watcher.gradients(index, found[1 + len(places) + len(others) :], first=first)

    def _end(self, each: _MicroBatch) -> None:
        """The backward pass of what comes before the blocks."""
        ends = [(each.entering, each.gradient)]
        ends += [(tensor, its) for (tensor, _), its in zip(each.shared, each.of_shared, strict=True)]
        known = [(end, its) for end, its in ends if its is not None and end.requires_grad]
        if known:
            torch.autograd.backward([end for end, _ in known], [its for _, its in known])


def _holds(parameters: Sequence[nn.Parameter], parameter: nn.Parameter) -> bool:
    return any(each is parameter for each in parameters)


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    if before is None or more is None:
        return more if before is None else before
    return before.add_(more)


def _random_state(device: torch.device) -> list[Tensor]:
    """What dropout draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _random_state_kept(device: torch.device | None) -> Iterator[None]:
    """Whatever is drawn within; `None`: nothing is."""
    if device is None:
        yield
        return
    states = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(device, states)
