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

All that micro-batches do in a block, in one direction, may be one CUDA graph
(`engines.model.block_major_graphs`): between two calls of the watcher nothing but kernels of the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.base import Batch
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.block_major_graphs import BlockMajorGraphs, CapturedStep, CaptureError, Passing
from engines.model.blocks import BlockDriver, to_device
from engines.model.cuda_graphs import replaced, tensors_of
from engines.model.hidden_states import HiddenStates

_Run = Callable[[str, Callable[[], None]], None]
"""Runs the work of that name."""


class BlockMajorWatcher(Protocol):
    """Told of the blocks' passes, by index. Only `gradients` may be captured in a graph."""

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
    before: Tensor
    """The hidden state before the first block, with the graph of what made it."""
    shared: list[Tensor]
    """Tensors that need gradients, and that blocks are called with."""
    passing: Passing


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
        graphs: BlockMajorGraphs | None = None,
    ) -> None:
        """`own` are the parameters of each block that `watcher` gets the gradients of; those of other
        parameters are added to their `grad`. `draws`: blocks draw random numbers. `hidden_states`: where
        those between blocks wait; `None`: where they are. `graphs`: what runs blocks as CUDA graphs, where
        weights and what `watcher` adds gradients to lie at the same places each time, and `hidden_states` is
        `None`; not where blocks have other parameters that are trained."""
        self._driver = BlockDriver(model)
        self._watcher = watcher
        self._own = [list(parameters) for parameters in own]
        self._others = [
            [p for p in block.parameters() if p.requires_grad and not _holds(mine, p)]
            for block, mine in zip(self._driver.blocks, self._own, strict=True)
        ]
        self._draws = draws
        self._hidden_states = hidden_states
        self._graphs = None if any(self._others) or draws else graphs
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
        if self._hidden_states is not None:
            self._hidden_states.forget()
        self._passing = begun = [self._begin(batch, device) for batch in batches]
        captured = self._forward_captured([each.passing for each in begun])
        eager = [each.passing for each in begun]
        passing: Sequence[Passing] = eager if captured is None else captured.passing
        if captured is None:
            self._forward_all(passing, _at_once)
        losses = []
        for number, (each, its) in enumerate(zip(begun, passing, strict=True)):
            loss, gradient = self._turn(each, its, of or len(begun))
            losses.append(loss)
            if captured is None:
                its.gradient = gradient
            else:
                captured.turn(number, gradient)
            del gradient  # of the size of a hidden state, and not needed here while the next one is made
        take_loss(torch.stack(losses).sum())
        if captured is None:
            self._backward_all(passing, len(self._own))
        else:
            passing = self._backward_captured(eager, captured)
        for each, its in zip(begun, passing, strict=True):
            self._end(each, its)
        if self._graphs is not None:
            self._graphs.end()
        self._passing = []

    def _forward_captured(self, passing: Sequence[Passing]) -> CapturedStep | None:
        """The micro-batches of this step after the last block, which have passed all as graphs; `None`: none
        has passed any, and they are to run without."""
        if self._graphs is None or (captured := self._graphs.step_of(passing)) is None:
            return None
        try:
            self._forward_all(captured.passing, captured.run)
        except CaptureError as error:
            why_not = str(error)
        else:
            return captured
        # HAZARD: not while the error is handled, whose frames hold what the passes had.
        self._graphs.give_up(why_not)
        return None

    def _forward_all(self, passing: Sequence[Passing], run: _Run) -> None:
        away = self._hidden_states
        for index in range(len(self._own)):
            self._watcher.before_forward(index)
            run(f"forward {index}", partial(self._forward_block, index, passing))
            self._watcher.after_forward(index)
            if away is not None:
                away.empty(index - 1)

    def _backward_captured(self, eager: Sequence[Passing], captured: CapturedStep) -> Sequence[Passing]:
        """The micro-batches of this step before the first block, which have gone back through all: as graphs,
        or the `eager` ones from where that failed."""
        for index in reversed(range(len(self._own))):
            gradients, why_not = [each.gradient for each in captured.passing], None
            try:
                self._pass_backward(index, captured.passing, captured.run)
            except CaptureError as error:
                why_not = str(error)
            if why_not is not None:  # HAZARD: as above
                assert self._graphs is not None
                self._graphs.give_up(why_not)
                # What blocks keep is gone. Nobody has updated them yet, so that they make it again.
                for earlier in range(index + 1):
                    self._forward_block(earlier, eager)
                for each, gradient in zip(eager, gradients, strict=True):
                    each.gradient = gradient
                self._backward_all(eager, index + 1)
                return eager
        return captured.passing

    def _backward_all(self, passing: Sequence[Passing], blocks: int) -> None:
        """Through the first so many, the last one first."""
        for index in reversed(range(blocks)):
            self._pass_backward(index, passing, _at_once)

    def _pass_backward(self, index: int, passing: Sequence[Passing], run: _Run) -> None:
        away = self._hidden_states
        self._watcher.before_backward(index)
        if away is not None:
            away.back(index)
            away.bring(index - 1)
        run(f"backward {index}", partial(self._backward_block, index, passing))
        self._watcher.after_backward(index)

    def used_before(self) -> set[Tensor]:
        """Parameters that are no block's own and whose gradients go on after the losses: of what comes before
        the blocks, or is used in them. To be asked within `take_loss`."""
        found: set[Tensor] = {parameter for others in self._others for parameter in others}
        ends = [end for each in self._passing for end in (each.before, *each.shared)]
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
        passing = Passing(
            calls=calls,
            shared=places,
            padded=padded,
            last=recording.hidden.detach(),
            of_shared=[None] * len(shared),
        )
        return _MicroBatch(inputs=inputs, before=recording.hidden, shared=shared, passing=passing)

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

    def _forward_block(self, index: int, passing: Sequence[Passing]) -> None:
        for number, each in enumerate(passing):
            self._forward(index, number, each)

    def _forward(self, index: int, number: int, each: Passing) -> None:
        entering = each.last.requires_grad_()
        with torch.enable_grad():
            result = self._driver.run(index, each.calls[index], entering)
        each.passed.append((entering, result))
        each.last = result.detach()
        if self._hidden_states is not None:
            self._hidden_states.take(index, number, entering, result)

    def _turn(self, each: _MicroBatch, its: Passing, count: int) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient of the hidden state after the last block."""
        # A tensor of its own: graphs write to the same place in every step.
        hidden = its.last.detach().requires_grad_()
        with torch.enable_grad(), known_padding(its.padded):
            loss = self._driver.finish(each.inputs, hidden).loss / count
        loss.backward()
        assert hidden.grad is not None
        share: Tensor = loss.detach().float()
        return share, hidden.grad

    def _backward_block(self, index: int, passing: Sequence[Passing]) -> None:
        for number, each in enumerate(passing):
            self._backward(index, each, first=number == 0)

    def _backward(self, index: int, each: Passing, *, first: bool) -> None:
        entering, result = each.passed.pop()
        own, others = self._own[index], self._others[index]
        places = each.shared
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

    def _end(self, each: _MicroBatch, its: Passing) -> None:
        """The backward pass of what comes before the blocks."""
        ends = [(each.before, its.gradient)]
        ends += list(zip(each.shared, its.of_shared, strict=True))
        known = [(end, gradient) for end, gradient in ends if gradient is not None and end.requires_grad]
        if known:
            torch.autograd.backward([end for end, _ in known], [gradient for _, gradient in known])


def _at_once(name: str, work: Callable[[], None]) -> None:
    work()


def _holds(parameters: Sequence[nn.Parameter], parameter: nn.Parameter) -> bool:
    return any(each is parameter for each in parameters)


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    if before is None or more is None:
        return more if before is None else before
    return before.add_(more)
