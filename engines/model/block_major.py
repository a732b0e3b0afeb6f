"""Forward and backward of a step's micro-batches, block by block: all of them pass a block before any passes
the next one.

The gradients of a block are complete when the backward passes of all micro-batches have left it, long before
the step's end, and what is done with them has the rest of the step to itself. (GreedySnake, 2512.17570, calls
it the vertical order. With micro-batches one after the other only the last backward pass would be left.) The
gradients of one block at a time are there, however many micro-batches there are.

Between two blocks the hidden states of all micro-batches are kept, each with the graph of its block: what
that holds, the block's activations or its input alone, is the block's own matter
(`engines.model.training_regions`). Outside the blocks the model's own forward runs, one micro-batch at a
time, so that one micro-batch's logits are there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.base import Batch
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import BlockCall, BlockDriver, to_device
from engines.model.cuda_graphs import replaced, tensors_of
from engines.model.hidden_states import HiddenStates


class BlockMajorWatcher(Protocol):
    """Told of the blocks' passes, by index."""

    def before_forward(self, index: int) -> None:
        """The block's weights are about to be used."""

    def after_forward(self, index: int) -> None:
        """All micro-batches have passed it."""

    def before_backward(self, index: int) -> None:
        """Its weights are again, and its gradients are about to be made."""

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        """One micro-batch's, of the block's own parameters in their order; `None`: it did not use one.
        `first`: of the first micro-batch in this step. They are summed elsewhere."""

    def after_backward(self, index: int) -> None:
        """All gradients of the block have been handed over."""


@dataclass(slots=True)
class _MicroBatch:
    inputs: dict[str, Tensor]
    padded: bool
    calls: Sequence[BlockCall]
    shared: list[tuple[Tensor, Tensor]]
    """Tensors that need gradients, and that blocks are called with, each with its place in `calls`."""
    before: Tensor
    """The hidden state before the first block, with the graph of what made it."""
    last: Tensor
    """The hidden state where the forward pass is."""
    passed: list[tuple[Tensor, Tensor]]
    """What entered each block so far and what left it, with the block's graph between them."""
    of_shared: list[Tensor | None]
    gradient: Tensor | None = None
    """Of the hidden state where the backward pass is."""


class BlockMajor:
    """A model's training passes. Raises `UserError` for a model without a row of blocks."""

    def __init__(
        self,
        model: nn.Module,
        own: Sequence[Sequence[nn.Parameter]],
        watcher: BlockMajorWatcher,
        *,
        draws: bool,
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """`own` are the parameters of each block that `watcher` gets the gradients of; those of other
        parameters are added to their `grad`. `draws`: blocks draw random numbers. `hidden_states`: where
        those between blocks wait; `None`: where they are."""
        self._driver = BlockDriver(model)
        self._watcher = watcher
        self._own = [list(parameters) for parameters in own]
        self._others = [
            [p for p in block.parameters() if p.requires_grad and not _holds(mine, p)]
            for block, mine in zip(self._driver.blocks, self._own, strict=True)
        ]
        self._draws = draws
        self._hidden_states = hidden_states
        self._knows_form = False
        self._passing: list[_MicroBatch] = []

    def run(
        self,
        batches: Sequence[Batch],
        device: torch.device,
        take_loss: Callable[[Tensor], None],
        of: int | None = None,
    ) -> None:
        """Forward and backward of the mean loss of `batches`, or of their share in the mean of `of` ones;
        nothing here waits for the GPU.

        `take_loss` is called with that loss, fp32 on the device, before the backward passes of the blocks.
        """
        away = self._hidden_states
        if away is not None:
            away.forget()
        self._passing = passing = [self._begin(batch, device) for batch in batches]
        for index in range(len(self._own)):
            self._watcher.before_forward(index)
            for number, each in enumerate(passing):
                self._forward(index, each)
                if away is not None:
                    away.take(index, number, *each.passed[index])
            self._watcher.after_forward(index)
            if away is not None:
                away.empty(index - 1)
        losses = [self._turn(each, of or len(passing)) for each in passing]
        take_loss(torch.stack(losses).sum())
        for index in reversed(range(len(self._own))):
            self._watcher.before_backward(index)
            if away is not None:
                away.back(index)
                away.bring(index - 1)
            for number, each in enumerate(passing):
                self._backward(index, each, first=number == 0)
            self._watcher.after_backward(index)
        for each in passing:
            self._end(each)
        self._passing = []

    def used_before(self) -> set[Tensor]:
        """Parameters that are no block's own and whose gradients go on after the losses: of what comes before
        the blocks, or is used in them. To be asked within `take_loss`."""
        found: set[Tensor] = {parameter for others in self._others for parameter in others}
        ends = [
            end for each in self._passing for end in (each.before, *(tensor for tensor, _ in each.shared))
        ]
        nodes, seen = [end.grad_fn for end in ends], set()
        found.update(end for end in ends if end.requires_grad and end.is_leaf)
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.add(leaf)
            nodes += [earlier for earlier, _ in node.next_functions]
        return found

    def _begin(self, batch: Batch, device: torch.device) -> _MicroBatch:
        inputs = with_mask(to_device(batch, device))
        padded = has_padding(batch.inputs)
        with known_padding(padded):
            if not self._knows_form:
                self._learn_form(inputs, device)
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
            calls=calls,
            shared=list(zip(shared, places, strict=True)),
            before=recording.hidden,
            last=recording.hidden.detach(),
            passed=[],
            of_shared=[None] * len(shared),
        )

    def _learn_form(self, inputs: dict[str, Tensor], device: torch.device) -> None:
        """Run the first block once, which leaves no trace: a run that goes on from a checkpoint does it
        too."""
        self._watcher.before_forward(0)
        devices = [device] if device.type == "cuda" else []
        compiler: Any = torch.compiler  # its methods are without annotations
        with (
            torch.no_grad(),
            compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices, enabled=self._draws),
        ):
            self._driver.learn_forms(inputs)
        self._knows_form = True

    def _forward(self, index: int, each: _MicroBatch) -> None:
        entering = each.last.requires_grad_()
        with torch.enable_grad():
            result = self._driver.run(index, each.calls[index], entering)
        each.passed.append((entering, result))
        each.last = result.detach()

    def _turn(self, each: _MicroBatch, count: int) -> Tensor:
        """The loss, and the gradient of the hidden state after the last block."""
        hidden = each.last.requires_grad_()
        with torch.enable_grad(), known_padding(each.padded):
            loss = self._driver.finish(each.inputs, hidden).loss / count
        loss.backward()
        assert hidden.grad is not None
        each.gradient = hidden.grad
        share: Tensor = loss.detach().float()
        return share

    def _backward(self, index: int, each: _MicroBatch, *, first: bool) -> None:
        entering, result = each.passed.pop()
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
            # A copy: autograd may give one tensor, or a number expanded, as the gradient of several.
            if its is not None:
                parameter.grad = its.clone() if parameter.grad is None else parameter.grad.add_(its)
        self._watcher.gradients(index, found[1 + len(places) + len(others) :], first=first)

    def _end(self, each: _MicroBatch) -> None:
        """The backward pass of what comes before the blocks."""
        ends = [(each.before, each.gradient)]
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
