"""A model's blocks in training: what runs before and after each, and recomputation in the backward pass.

The model's own forward drives everything; only the blocks' `forward` is replaced. With `recompute` a block
keeps nothing but its input until the backward pass, which runs it again (activation checkpointing,
1604.06174), and may do both as CUDA graphs: one launch in place of some fifty in the forward pass and some
hundred and fifty in the backward pass, each of which costs the CPU 10 to 50 microseconds. A graph computes
what the block's own kernels compute, on copies of its inputs at fixed places. A block is captured in the step
after the first in which inputs of its form are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from engines.model.blocks import BlockCall, find_blocks, split_call
from engines.model.cuda_graphs import MOST_FORMS, form_key, replaced, tensors_of
from engines.model.randomness import draws_random_numbers

_cuda: Any = torch.cuda  # most of it is without annotations


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

    def __init__(self, model: nn.Module, watcher: Watcher, *, recompute: bool, graphs: bool) -> None:
        """`graphs` are for CUDA, recomputation, and blocks that draw no random numbers."""
        _, self.blocks = find_blocks(model)
        self._watcher = watcher
        self._recompute = recompute
        self._keeps_random_state = draws_random_numbers(model)
        self._inner = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self._forwards: list[Callable[..., Any]] = [block.forward for block in self.blocks]
        parameter = next(model.parameters())
        # Passed through every block: its output then has a gradient even if its input has none.
        self._anchor = torch.zeros((), device=parameter.device, requires_grad=True)
        self._graphs = _Graphs(self) if graphs and recompute and parameter.is_cuda else None
        self.uses_graphs = True
        """False: as without graphs, for a step that does something else than usual."""
        for index, block in enumerate(self.blocks):
            vars(block)["forward"] = partial(self._call, index)

    def begin(self) -> None:
        """A new step."""
        if self._graphs is not None:
            self._graphs.begin()

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block in self.blocks:
            vars(block).pop("forward", None)
        self._graphs = None

    def _call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        self._watcher.before_forward(index)
        if not torch.is_grad_enabled():
            return self._forwards[index](*args, **kwargs)
        hidden, call = split_call(args, kwargs)
        if self._recompute:
            others = [each for each in tensors_of([call]) if each.requires_grad]
            results: Any = _recomputed(self._anchor, hidden, self, index, call, *others)
            return self._in_form(results)
        entered = _passing(self._anchor, hidden, partial(self._left, index))
        found = self._forwards[index](entered, *call.args, **call.kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first = _passing(self._anchor, first, partial(self._watcher.before_backward, index))
        return (first, *found[1:]) if isinstance(found, tuple) else first

    def _left(self, index: int) -> None:
        self._watcher.finish(index)
        self._watcher.after_backward(index)

    _form: tuple[Any, ...] | None = None
    """What blocks return, with `_TENSOR` in place of tensors; `None`: the hidden state itself."""

    _has_run = False

    def run(self, index: int, call: BlockCall, hidden: Tensor) -> tuple[Tensor, ...]:
        """The block itself: the tensors that it returns, the hidden state first."""
        self._has_run = True
        found = self._forwards[index](hidden, *call.args, **call.kwargs)
        if not isinstance(found, tuple):
            self._form = None
            return (found,)
        self._form = tuple(_TENSOR if isinstance(each, Tensor) else each for each in found)
        return tuple(each for each in found if isinstance(each, Tensor))

    def _in_form(self, results: Sequence[Tensor]) -> Any:
        """As the model expects what a block returns."""
        if self._form is None:
            return results[0]
        left = iter(results)
        return tuple(next(left) if each is _TENSOR else each for each in self._form)

    def run_back(
        self,
        index: int,
        call: BlockCall,
        hidden: Tensor,
        gradients: Sequence[Tensor | None],
        others: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Run the block again and its backward pass, from the gradients of what `run` gives: the gradients of
        `hidden` and of `others`, which are tensors of `call`. Adds to those of parameters."""
        with torch.enable_grad():
            entering = hidden.detach().requires_grad_()
            apart = {id(each): each.detach().requires_grad_() for each in others}
            if others:
                (call,) = replaced([call], [apart.get(id(each), each) for each in tensors_of([call])])
            results = self.run(index, call, entering)
        known = [
            (result, gradient)
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and result.requires_grad
        ]
        inputs = [entering, *apart.values(), *self._inner[index]]
        found: Any = torch.autograd.grad(
            [result for result, _ in known], inputs, [gradient for _, gradient in known], allow_unused=True
        )
        of_inputs = 1 + len(apart)
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
    ) -> tuple[Tensor, ...]:
        graphs = self._graphs_for(others)
        return self.run(index, call, hidden) if graphs is None else (graphs.forward(index, call, hidden),)

    def backward(
        self,
        index: int,
        call: BlockCall,
        hidden: Tensor,
        gradients: Sequence[Tensor | None],
        others: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """As `run_back`."""
        self._watcher.before_backward(index)
        graphs, gradient = self._graphs_for(others), gradients[0]
        if graphs is None or gradient is None:
            found = self.run_back(index, call, hidden, gradients, others)
        else:
            found = [graphs.backward(index, call, hidden, gradient)]
        self._watcher.after_backward(index)
        return found

    def _graphs_for(self, others: Sequence[Tensor]) -> _Graphs | None:
        """A graph takes and gives the hidden state and its gradient, and no other tensor's. Until a block has
        run it is not known what blocks return."""
        alone = self._has_run and not others and (self._form is None or self._form.count(_TENSOR) == 1)
        return self._graphs if self.uses_graphs and alone else None

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


class _Recomputed(torch.autograd.Function):
    """A block that keeps its input only."""

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
        return blocks.forward(index, call, hidden, others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks: TrainedBlocks = ctx.blocks
        (hidden,) = ctx.saved_tensors
        after = None
        if ctx.state is not None:
            after = blocks.random_state()
            blocks.set_random_state(ctx.state)
        of_hidden, *of_others = blocks.backward(ctx.index, ctx.call, hidden, gradients, ctx.others)
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
_recomputed: Callable[..., tuple[Tensor, ...]] = _Recomputed.apply
_passing: Callable[..., Tensor] = _Passing.apply


@dataclass(slots=True)
class _Place:
    """A fixed place for an input of blocks."""

    tensor: Tensor
    source: Tensor | None = None
    """What lies there now."""

    def load(self, source: Tensor) -> None:
        if self.source is not source:
            self.tensor.copy_(source)
            self.source = source


@dataclass(slots=True)
class _Captured:
    graph: Any
    places: list[_Place]


@dataclass(slots=True)
class _Form:
    """Graphs for inputs of one form, and the places where those are."""

    since: int
    """The step in which it was first seen."""
    hidden: Tensor
    gradient: Tensor
    shared: list[_Place] = field(default_factory=list)
    forward: dict[int, _Captured] = field(default_factory=dict)
    backward: dict[int, _Captured] = field(default_factory=dict)


class _Graphs:
    """HAZARD: weights, gradients, cores and projectors must lie at the same places each time."""

    def __init__(self, blocks: TrainedBlocks) -> None:
        self._blocks = blocks
        self._forms: dict[Any, _Form] = {}
        self._step = 0
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream()

    def begin(self) -> None:
        self._step += 1
        for form in self._forms.values():
            for place in form.shared:
                place.source = None

    def forward(self, index: int, call: BlockCall, hidden: Tensor) -> Tensor:
        form = self._form(call, hidden)
        if form is None:
            return self._blocks.run(index, call, hidden)[0]
        form.hidden.copy_(hidden)

        def work(placed: BlockCall) -> None:
            form.hidden.copy_(self._blocks.run(index, placed, form.hidden)[0])

        self._replay(form, form.forward, index, call, work)
        return form.hidden.clone()

    def backward(self, index: int, call: BlockCall, hidden: Tensor, gradient: Tensor) -> Tensor:
        form = self._form(call, hidden)
        if form is None:
            (found,) = self._blocks.run_back(index, call, hidden, [gradient])
            return cast(Tensor, found)
        form.hidden.copy_(hidden)
        form.gradient.copy_(gradient)

        def work(placed: BlockCall) -> None:
            (found,) = self._blocks.run_back(index, placed, form.hidden, [form.gradient])
            form.gradient.copy_(cast(Tensor, found))

        self._replay(form, form.backward, index, call, work)
        return form.gradient.clone()

    def _form(self, call: BlockCall, hidden: Tensor) -> _Form | None:
        """`None`: too early, or a form too many."""
        key = (tuple(hidden.shape), hidden.dtype, form_key(call))
        if key not in self._forms:
            if len(self._forms) == MOST_FORMS:
                return None
            self._forms[key] = _Form(self._step, torch.empty_like(hidden), torch.empty_like(hidden))
        form = self._forms[key]
        return form if form.since < self._step else None

    def _replay(
        self,
        form: _Form,
        captured: dict[int, _Captured],
        index: int,
        call: BlockCall,
        work: Callable[[BlockCall], None],
    ) -> None:
        sources = tensors_of([call])
        if index not in captured:
            if not (form.forward or form.backward):
                # Graphs have a pool of their own: what earlier steps left in the ordinary one is room for it.
                _cuda.empty_cache()
            places = [self._place(form, source) for source in sources]
            (placed,) = replaced([call], [place.tensor for place in places])
            captured[index] = _Captured(self._capture(lambda: work(placed)), places)
        for place, source in zip(captured[index].places, sources, strict=True):
            place.load(source)
        captured[index].graph.replay()

    def _place(self, form: _Form, source: Tensor) -> _Place:
        """Where `source` lies now, or a new place for it: blocks share masks and positions."""
        for place in form.shared:
            if place.source is source:
                return place
        form.shared.append(_Place(torch.empty_like(source)))
        form.shared[-1].load(source)
        return form.shared[-1]

    def _capture(self, work: Callable[[], None]) -> Any:
        graph = _cuda.CUDAGraph()
        torch.cuda.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph
