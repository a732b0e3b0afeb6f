"""A model's blocks in training: what runs before and after each, and recomputation in the backward pass.

The model's own forward drives everything; only the blocks' `forward` is replaced. A recomputed block keeps
nothing but its input until the backward pass, which runs it again (activation checkpointing, 1604.06174);
where it is compiled, the compiler leaves out of the second run what no gradient needs. Both passes of a block
may run as CUDA graphs (`engines.model.training_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engines.errors import first_line
from engines.model.blocks import BlockCall, find_blocks, split_call
from engines.model.cuda_graphs import replaced, tensors_of
from engines.model.randomness import draws_random_numbers
from engines.model.training_graphs import Ran, TrainingGraphs
from engines.model.training_regions import compiled_block

_TENSOR = object()


class Watcher(Protocol):
    """Told of the blocks' passes, by index. Only `finish` may be captured in a graph."""

    def before_forward(self, index: int) -> None: ...

    def before_backward(self, index: int) -> None: ...

    def finish(self, index: int) -> None:
        """All gradients of the block have been computed; what belongs on the GPU to that."""

    def after_backward(self, index: int) -> None: ...


class TrainedBlocks:
    """The blocks of a model, watched."""

    def __init__(
        self, model: nn.Module, watcher: Watcher, *, recomputed: int, graphs: bool, compiled: bool = False
    ) -> None:
        """The first `recomputed` blocks are run again in the backward pass, the others keep what it needs.
        `graphs` are for CUDA and for blocks that draw no random numbers. `compiled`: blocks run through
        torch's compiler."""
        _, self.blocks = find_blocks(model)
        self._watcher = watcher
        self._recomputed = min(recomputed, len(self.blocks))
        self._keeps_random_state = draws_random_numbers(model)
        self._inner = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self._forwards: list[Callable[..., Any]] = [block.forward for block in self.blocks]
        self._compiled: list[Callable[..., Any]] | None = None
        self.why_not_compiled: str | None = None
        """What the compiler said where it failed; `None`: it has not failed."""
        if compiled:
            self._compiled = [
                compiled_block(own, is_recomputed=self.is_recomputed(index), draws=self._keeps_random_state)
                for index, own in enumerate(self._forwards)
            ]
        parameter = next(model.parameters())
        # Passed through every block: its output then has a gradient even if its input has none.
        self._anchor = torch.zeros((), device=parameter.device, requires_grad=True)
        self._graphs = TrainingGraphs(self) if graphs and parameter.is_cuda else None
        self.is_usual = True
        """False: neither compiled nor as graphs, for a step that does something else than usual."""
        for index, block in enumerate(self.blocks):
            vars(block)["forward"] = partial(self._call, index)

    def is_recomputed(self, index: int) -> bool:
        """Whether that block is run again in the backward pass."""
        return index < self._recomputed

    def keeps_edge(self, index: int) -> bool:
        """Whether that block's forward pass is run for its gradients at once: what is kept is kept then, and
        what is compiled keeps its input alone."""
        return not self.is_recomputed(index) or (self._compiled is not None and self.is_usual)

    def begin(self) -> None:
        """A new step. Memory of graphs that hold activations is let go of for an unusual one, which needs as
        much outside them."""
        if self._graphs is not None:
            if not self.is_usual and self._recomputed < len(self.blocks):
                self._graphs.forget()
            self._graphs.begin()

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block in self.blocks:
            vars(block).pop("forward", None)
        self._graphs = None

    def _call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        self._watcher.before_forward(index)
        if not torch.is_grad_enabled():
            return self._own(index)(*args, **kwargs)
        hidden, call = split_call(args, kwargs)
        others = [each for each in tensors_of([call]) if each.requires_grad]
        if self.is_recomputed(index) or self._graphs_for(call, hidden, others) is not None:
            return self._in_form(_driven(self._anchor, hidden, self, index, call, *others))
        entered = _passing(self._anchor, hidden, partial(self._left, index))
        first, *rest = self.run(index, call, entered)
        first = _passing(self._anchor, first, partial(self._watcher.before_backward, index))
        return self._in_form((first, *rest))

    def _own(self, index: int) -> Callable[..., Any]:
        """The block's own forward."""
        if self._compiled is None or not self.is_usual:
            return self._forwards[index]
        return partial(self._run_compiled, index)

    def _run_compiled(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """The block through the compiler. Where that fails, before anything has run, no block is compiled
        from then on."""
        if self._compiled is None:
            return self._forwards[index](*args, **kwargs)
        try:
            return self._compiled[index](*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.why_not_compiled = first_line(error)
            self._compiled = None
            return self._forwards[index](*args, **kwargs)

    def _left(self, index: int) -> None:
        self._watcher.finish(index)
        self._watcher.after_backward(index)

    _form: tuple[Any, ...] | None = None
    """What blocks return, with `_TENSOR` in place of tensors; `None`: the hidden state itself."""

    _has_run = False

    def run(self, index: int, call: BlockCall, hidden: Tensor) -> tuple[Tensor, ...]:
        """The block itself: the tensors that it returns, the hidden state first."""
        self._has_run = True
        found = self._own(index)(hidden, *call.args, **call.kwargs)
        if not isinstance(found, tuple):
            self._form = None
            return (found,)
        self._form = tuple(_TENSOR if isinstance(each, Tensor) else each for each in found)
        return tuple(each for each in found if isinstance(each, Tensor))

    def _in_form(self, results: Sequence[Tensor]) -> Any:
        """The tensors of `run` in the form in which the block returned them to its model."""
        if self._form is None:
            return results[0]
        left = iter(results)
        return tuple(next(left) if each is _TENSOR else each for each in self._form)

    def run_apart(self, index: int, call: BlockCall, hidden: Tensor, others: Sequence[Tensor] = ()) -> Ran:
        """Run the block with a graph of autograd of its own. `others` are tensors of `call` whose gradients
        are wanted beside that of `hidden`."""
        with torch.enable_grad():
            entering = hidden.detach().requires_grad_()
            apart = {id(each): each.detach().requires_grad_() for each in others}
            if others:
                (call,) = replaced([call], [apart.get(id(each), each) for each in tensors_of([call])])
            results = self.run(index, call, entering)
        edges = [get_gradient_edge(each) if each.requires_grad else None for each in results]
        return Ran([each.detach() for each in results], edges, [entering, *apart.values()])

    def gradients(
        self,
        index: int,
        edges: Sequence[GradientEdge | None],
        gradients: Sequence[Tensor | None],
        entering: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Backward pass of a block that has run: gradients of `entering` from those of its results. Adds to
        those of parameters."""
        known = [
            (edge, gradient)
            for edge, gradient in zip(edges, gradients, strict=True)
            if edge is not None and gradient is not None
        ]
        inputs = [*entering, *self._inner[index]]
        found: Any = torch.autograd.grad(
            [edge for edge, _ in known], inputs, [gradient for _, gradient in known], allow_unused=True
        )
        of_inputs = len(entering)
        for parameter, its in zip(self._inner[index], found[of_inputs:], strict=True):
            if its is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(its)
        self._watcher.finish(index)
        return list(found[:of_inputs])

    def forward(
        self, index: int, call: BlockCall, hidden: Tensor, others: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Ran | None]:
        """The tensors that a driven block returns, without a graph of autograd, and what its backward pass
        goes on from, unless that begins anew or is a CUDA graph."""
        graphs = self._graphs_for(call, hidden, others)
        if graphs is not None:
            return (graphs.forward(index, call, hidden),), None
        if not self.keeps_edge(index):
            return self.run(index, call, hidden), None
        ran = self.run_apart(index, call, hidden, others)
        return tuple(ran.results), ran

    def backward(
        self,
        index: int,
        call: BlockCall,
        hidden: Tensor,
        gradients: Sequence[Tensor | None],
        others: Sequence[Tensor],
        ran: Ran | None,
    ) -> list[Tensor | None]:
        """Gradients of `hidden` and `others` from those of what `forward` gave, the watcher told."""
        self._watcher.before_backward(index)
        graphs, gradient = self._graphs_for(call, hidden, others), gradients[0]
        if graphs is not None and gradient is not None and ran is None:
            found: list[Tensor | None] = [graphs.backward(index, call, hidden, gradient)]
        else:
            from_here = ran or self.run_apart(index, call, hidden, others)
            found = self.gradients(index, from_here.edges, gradients, from_here.entering)
        self._watcher.after_backward(index)
        return found

    def _graphs_for(self, call: BlockCall, hidden: Tensor, others: Sequence[Tensor]) -> TrainingGraphs | None:
        """A graph takes and gives the hidden state and its gradient, and no other tensor's. Until a block has
        run it is not known what blocks return."""
        alone = self._has_run and not others and (self._form is None or self._form.count(_TENSOR) == 1)
        graphs = self._graphs if self.is_usual and alone else None
        return graphs if graphs is not None and graphs.knows(call, hidden) else None

    def random_state(self) -> list[Tensor] | None:
        """What dropout draws from; `None` if nothing draws."""
        if not self._keeps_random_state:
            return None
        states = [torch.get_rng_state()]
        if self._anchor.is_cuda:
            states.append(torch.cuda.get_rng_state(self._anchor.device))
        return states

    def set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._anchor.is_cuda:
            torch.cuda.set_rng_state(states[1], self._anchor.device)


class _Driven(torch.autograd.Function):
    """A block whose passes `TrainedBlocks` runs, and which keeps its input only."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        hidden: Tensor,
        blocks: TrainedBlocks,
        index: int,
        call: BlockCall,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """`others`: the tensors of `call` that need gradients."""
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.index, ctx.call, ctx.others = blocks, index, call, others
        ctx.state = blocks.random_state()
        ctx.save_for_backward(hidden)
        results, ctx.ran = blocks.forward(index, call, hidden, others)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks: TrainedBlocks = ctx.blocks
        (hidden,) = ctx.saved_tensors
        after = None
        if ctx.state is not None:
            after = blocks.random_state()
            blocks.set_random_state(ctx.state)
        # HAZARD: a graph must not be captured while one of an earlier step, made on another stream, still
        # holds the parameters' places in autograd.
        ran, ctx.ran = ctx.ran, None
        of_hidden, *of_others = blocks.backward(ctx.index, ctx.call, hidden, gradients, ctx.others, ran)
        if after is not None:
            blocks.set_random_state(after)
        return None, of_hidden if ctx.needs_input_grad[1] else None, None, None, None, *of_others


class _Passing(torch.autograd.Function):
    """A hidden state passes a point; `act` is called when its gradient, which is complete then, passes it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.act()
        return None, gradients[0] if ctx.needs_input_grad[1] else None, None


# torch's method is without annotations.
_driven: Callable[..., tuple[Tensor, ...]] = _Driven.apply
_passing: Callable[..., Tensor] = _Passing.apply
