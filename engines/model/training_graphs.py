"""Both passes of a model's blocks as CUDA graphs: one launch in place of some fifty in the forward pass and
some hundred and fifty in the backward pass, each of which costs the CPU 10 to 50 microseconds.

A graph computes what the block's own kernels compute, on copies of its inputs at fixed places. A block is
captured in the step after the first in which inputs of its form are seen. All graphs share one pool of
memory: they are replayed in the order in which they were captured, so what one has freed another may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from engines.model.blocks import BlockCall
from engines.model.cuda_graphs import MOST_FORMS, form_key, replaced, tensors_of
from engines.model.graph_capture import capturing

_cuda: Any = torch.cuda  # most of it is without annotations


@dataclass(slots=True)
class Ran:
    """A block that has run."""

    results: list[Tensor]
    """What it returned, the hidden state first, detached."""
    edges: list[GradientEdge | None]
    """Where gradients of the results go in; `None` for one that needs none."""
    entering: list[Tensor]
    """What it ran on and whose gradients come out: the hidden state first."""


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
    ran: dict[int, Ran] = field(default_factory=dict)
    """Blocks whose backward pass goes on from their forward pass, until it is captured."""
    forward: dict[int, _Captured] = field(default_factory=dict)
    backward: dict[int, _Captured] = field(default_factory=dict)


class RunsBlocks(Protocol):
    """Passes of a model's blocks, by index; `engines.model.activation_checkpointing.TrainedBlocks`."""

    def is_recomputed(self, index: int) -> bool: ...

    def keeps_edge(self, index: int) -> bool: ...

    def run(self, index: int, call: BlockCall, hidden: Tensor) -> tuple[Tensor, ...]: ...

    def run_apart(self, index: int, call: BlockCall, hidden: Tensor) -> Ran: ...

    def gradients(
        self,
        index: int,
        edges: Sequence[GradientEdge | None],
        gradients: Sequence[Tensor | None],
        entering: Sequence[Tensor],
    ) -> list[Tensor | None]: ...


class TrainingGraphs:
    """HAZARD: weights, gradients, cores and projectors must lie at the same places each time."""

    def __init__(self, blocks: RunsBlocks) -> None:
        self._blocks = blocks
        self._forms: dict[Any, _Form] = {}
        self._last: tuple[BlockCall, torch.Size, torch.dtype, _Form | None] | None = None
        """What was asked for last, which is asked for again at once."""
        self._step = 0
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream()

    def begin(self) -> None:
        self._step += 1
        self._last = None
        for form in self._forms.values():
            for place in form.shared:
                place.source = None

    def forget(self) -> None:
        """Let go of all graphs and their memory; forms count as new."""
        self._forms.clear()
        self._last = None
        self._pool = _cuda.graph_pool_handle()  # the one before goes with its last graph
        _cuda.empty_cache()

    def knows(self, call: BlockCall, hidden: Tensor) -> bool:
        """Whether inputs of this form run as graphs: not in the step that saw the first, and no form too
        many."""
        form = self._form(call, hidden)
        return form is not None and form.since < self._step

    def _form(self, call: BlockCall, hidden: Tensor) -> _Form | None:
        """`None`: a form too many."""
        last = self._last
        if last is not None and last[0] is call and last[1:3] == (hidden.shape, hidden.dtype):
            return last[3]
        key = (tuple(hidden.shape), hidden.dtype, form_key(call))
        if key not in self._forms and len(self._forms) < MOST_FORMS:
            self._forms[key] = _Form(self._step, torch.empty_like(hidden), torch.empty_like(hidden))
        form = self._forms.get(key)
        self._last = (call, hidden.shape, hidden.dtype, form)
        return form

    def forward(self, index: int, call: BlockCall, hidden: Tensor) -> Tensor:
        """The hidden state after block `index`, of the form of `hidden`, which `knows`."""
        form = self._form(call, hidden)
        assert form is not None
        form.hidden.copy_(hidden)

        def work(placed: BlockCall) -> None:
            if not self._blocks.keeps_edge(index):
                form.hidden.copy_(self._blocks.run(index, placed, form.hidden)[0])
                return
            # HAZARD: other blocks write to the place before this block's backward pass. One that is run again
            # finds its input there then, and must not mind (`data` has a version of its own); one that is not
            # needs an input of its own.
            recomputes = self._blocks.is_recomputed(index)
            entering = form.hidden.data if recomputes else form.hidden.clone()
            ran = self._blocks.run_apart(index, placed, entering)
            form.hidden.copy_(ran.results[0])
            ran.results.clear()  # their memory is for others to use
            form.ran[index] = ran

        self._replay(form, form.forward, index, call, work)
        return form.hidden.clone()

    def backward(self, index: int, call: BlockCall, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of `hidden` from that of what `forward` gave; adds to those of parameters."""
        form = self._form(call, hidden)
        assert form is not None
        if self._blocks.is_recomputed(index):
            form.hidden.copy_(hidden)
        form.gradient.copy_(gradient)

        def work(placed: BlockCall) -> None:
            ran = form.ran.pop(index, None) or self._blocks.run_apart(index, placed, form.hidden)
            (found,) = self._blocks.gradients(index, ran.edges[:1], [form.gradient], ran.entering)
            form.gradient.copy_(cast(Tensor, found))

        self._replay(form, form.backward, index, call, work)
        return form.gradient.clone()

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
        with capturing(self._stream, self._pool) as graph:
            work()
        return graph
