"""Blocks as CUDA graphs: one launch in place of some fifty, each of which costs the CPU 10 to 50
microseconds.

For small blocks, whose kernels end before the CPU has started the next ones. A block is captured the second
time that inputs of a form are seen; the first time, and for a form too many, it runs as it is. A graph
computes what the block's own kernels compute, on copies of its inputs at fixed places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engines.model.blocks import BlockCall
from engines.model.graph_capture import capturing

MOST_FORMS = 4
"""Forms of inputs (shapes, dtypes, and what is no tensor) that are captured; a form has a graph per block."""

RunBlock = Callable[[int, BlockCall, Tensor], Tensor]

_cuda: Any = torch.cuda  # most of it is without annotations


@dataclass(slots=True)
class _Form:
    """Graphs for inputs of one form, and the places where those are."""

    hidden: Tensor
    tensors: list[Tensor]
    """The distinct tensors of all calls."""
    calls: list[BlockCall]
    graphs: dict[int, Any] = field(default_factory=dict)
    loaded: int = 0
    """Identity of the calls whose tensors are in `tensors`."""


class BlockGraphs:
    """Runs blocks as graphs, where their form is known.

    HAZARD: the weights that a block computes with must lie at the same places each time it is run.
    """

    def __init__(self, run: RunBlock) -> None:
        self._run = run
        self._forms: dict[Any, _Form] = {}
        self._met: set[Any] = set()
        self._new: set[Any] = set()
        self._known: dict[int, _Form | None] = {}
        """Of the calls of this step, by identity."""
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream()

    def run(self, index: int, calls: Sequence[BlockCall], hidden: Tensor, *, stacked: bool) -> Tensor:
        """The hidden state after block `index`; `calls` are those of all blocks for this micro-batch."""
        form = self._form(calls, hidden, stacked=stacked)
        if form is None:
            return self._run(index, calls[index], hidden)
        if form.loaded != id(calls):
            for place, tensor in zip(form.tensors, tensors_of(calls), strict=True):
                place.copy_(tensor)
            form.loaded = id(calls)
        form.hidden.copy_(hidden)
        if index not in form.graphs:
            form.graphs[index] = self._capture(index, form)
        form.graphs[index].replay()
        # The caller's own memory: several micro-batches take turns on the graph's.
        return hidden.copy_(form.hidden)

    def begin(self) -> None:
        """A new step: what was met before may be captured, and identities may name other calls."""
        self._met.update(self._new)
        self._new.clear()
        self._known.clear()
        for form in self._forms.values():
            form.loaded = 0

    def _form(self, calls: Sequence[BlockCall], hidden: Tensor, *, stacked: bool) -> _Form | None:
        if id(calls) not in self._known:
            key = (stacked, tuple(hidden.shape), form_key(calls))
            if key not in self._met:
                self._new.add(key)  # what is set up lazily is there the next time
            elif key not in self._forms and len(self._forms) < MOST_FORMS:
                tensors = [torch.empty_like(tensor) for tensor in tensors_of(calls)]
                self._forms[key] = _Form(torch.empty_like(hidden), tensors, replaced(calls, tensors))
            self._known[id(calls)] = self._forms.get(key)
        return self._known[id(calls)]

    def _capture(self, index: int, form: _Form) -> Any:
        if not form.graphs:
            torch.cuda.synchronize()
            _cuda.empty_cache()  # what the first step left in the ordinary pool is room for the graphs'
        with capturing(self._stream, self._pool) as graph:
            form.hidden.copy_(self._run(index, form.calls[index], form.hidden))
        return graph


def tensors_of(calls: Sequence[BlockCall]) -> list[Tensor]:
    """The distinct tensors in `calls`, in the order in which they are met."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()  # blocks are called with the same objects, most of which are no tensors

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, Mapping):
            for each in value.values():
                look(each)
        elif isinstance(value, tuple | list):
            for each in value:
                look(each)

    for call in calls:
        look(call.args)
        look(call.kwargs)
    return list(found.values())


def replaced(calls: Sequence[BlockCall], tensors: Sequence[Tensor]) -> list[BlockCall]:
    """`calls` with their distinct tensors replaced in order."""
    places = {id(old): new for old, new in zip(tensors_of(calls), tensors, strict=True)}

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return places[id(value)]
        if isinstance(value, Mapping):
            return {name: change(each) for name, each in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(change(each) for each in value)
        return value

    return [BlockCall(change(call.args), change(call.kwargs)) for call in calls]


def form_key(value: Any) -> Any:
    """What two calls must have in common to be run by one graph."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, BlockCall):
        return (form_key(value.args), form_key(value.kwargs))
    if isinstance(value, Mapping):
        return tuple((name, form_key(each)) for name, each in value.items())
    if isinstance(value, tuple | list):
        return tuple(form_key(each) for each in value)
    return repr(value)
