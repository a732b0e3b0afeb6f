"""What all micro-batches do in a block, in one direction, as one CUDA graph: two launches a block and step,
in place of some fifty for each micro-batch, each of which costs the CPU 10 to 50 microseconds.

Where all micro-batches pass a block before any passes the next one (`engines.model.block_major`), what each
keeps for its backward pass is there at once. So a graph is not run again for one micro-batch after the other,
with copies around it, as in `engines.model.training_graphs`. It holds them all, one after the other, each
with activations of its own, and goes on from where the graph of the block before has left them. There are
twice as many graphs as blocks, however many micro-batches there are, and no copies but those of what enters
the first block and of the gradients that enter the last.

All graphs share one pool of memory. They are captured in the order of a step and replayed in that order, so
what one has freed another uses, and the pool has the size of what blocks keep without graphs. A step whose
micro-batches have other forms has graphs of its own, all of them in the same pool: HAZARD: no step may take
some graphs of one and some of another, since what one keeps lies where the other writes. So a step runs as
graphs from the first block to the last or not at all. The first one of a form does not: kernels are chosen,
compiled and loaded in it, which no capture may do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engines.errors import first_line
from engines.model.blocks import BlockCall
from engines.model.cuda_graphs import MOST_FORMS, form_key, replaced, tensors_of
from engines.model.graph_capture import capturing

_cuda: Any = torch.cuda  # most of it is without annotations


class CaptureError(Exception):
    """A capture was spoilt; in one line by what."""


@dataclass(slots=True)
class Passing:
    """A micro-batch on its way through the blocks."""

    calls: Sequence[BlockCall]
    shared: list[Tensor]
    """Tensors of `calls` that need gradients."""
    padded: bool
    last: Tensor
    """The hidden state where the forward pass is, (batch, seq, hidden)."""
    of_shared: list[Tensor | None]
    """Gradients of `shared` so far."""
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What entered each block so far and what left it, with the block's graph of autograd between them."""
    gradient: Tensor | None = None
    """Of the hidden state where the backward pass is."""


class CapturedStep:
    """The graphs of steps whose micro-batches have the same forms, and the places of what they run on."""

    def __init__(self, graphs: BlockMajorGraphs) -> None:
        self._graphs = graphs
        self._captured: dict[str, Any] = {}
        self._places: list[list[_Place]] = []
        self._gradients: list[Tensor] = []
        self.passing: list[Passing] = []
        """The micro-batches at their places. Once captured, `last` and `gradient` are where graphs leave what
        comes after the last block, and the gradient of what entered the first."""
        self.has_run = False
        """A step of these forms has ended."""
        self.is_whole = False
        """All graphs are there."""

    @property
    def has_graphs(self) -> bool:
        return bool(self._captured)

    def forget(self) -> None:
        """Let go of graphs and places. They are captured anew."""
        self._captured, self._places, self._gradients, self.passing = {}, [], [], []
        self.is_whole = False

    @torch.no_grad()
    def load(self, passing: Sequence[Passing], sources: Sequence[Sequence[Tensor]]) -> None:
        """Put the micro-batches of a step to their places; `sources` are the tensors of each."""
        if not self._places:
            self._places = [[_Place(source) for source in its] for its in sources]
            for each, (hidden, *places) in zip(passing, self._places, strict=True):
                calls = replaced(each.calls, [place.tensor for place in places])
                self.passing.append(
                    Passing(
                        calls=calls, shared=[], padded=each.padded, last=hidden.tensor.detach(), of_shared=[]
                    )
                )
        for its, places in zip(sources, self._places, strict=True):
            for source, place in zip(its, places, strict=True):
                place.load(source)

    def run(self, name: str, work: Callable[[], None]) -> None:
        """The graph of that name, which is captured from `work` if there is none.

        Raises `CaptureError` for work that cannot be captured, or not with the memory that there is.
        """
        if name not in self._captured:
            self._captured[name] = self._graphs.capture(work)
        self._captured[name].replay()

    @torch.no_grad()
    def turn(self, number: int, gradient: Tensor) -> None:
        """The gradient of what left the last block, of the micro-batch of that number."""
        if number == len(self._gradients):
            self._gradients.append(torch.empty_like(gradient))
            self.passing[number].gradient = self._gradients[number]
        self._gradients[number].copy_(gradient)


class BlockMajorGraphs:
    """Of the steps of one engine, each in the form of its micro-batches.

    HAZARD: weights must lie at the same places each time, and so must what gradients are added to. What other
    streams do to either, the compute stream waits for between two graphs, and in none.
    """

    def __init__(
        self,
        device: torch.device,
        tell: Callable[[str], None],
        *,
        standing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`tell` is called once with why there are no graphs, if there can be none. What happens within
        `standing` is no work of the GPU's."""
        self._device = device
        self._tell = tell
        self._standing = standing
        self._steps: dict[Any, CapturedStep] = {}
        self._current: CapturedStep | None = None
        self._has_given_up = False
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream(device)

    def step_of(self, passing: Sequence[Passing]) -> CapturedStep | None:
        """What a step of these micro-batches runs as, which are at its places then; `None`: it is to run
        without graphs, as no step of its form has ended yet, or there are no graphs at all."""
        self._current = None
        if self._has_given_up:
            return None
        forms = [_form_of(each) for each in passing]
        key = tuple(key for key, _ in forms)
        if key not in self._steps:
            why_not = _why_not(passing, self._device)
            if why_not is None and len(self._steps) == MOST_FORMS:
                why_not = f"batches come in more than {MOST_FORMS} forms"
            if why_not is not None:
                self.give_up(why_not)
                return None
            self._steps[key] = CapturedStep(self)
        self._current = step = self._steps[key]
        if not step.has_run:
            # It needs for itself the memory that the pool has, which nothing else may use.
            self._release()
            return None
        if not step.is_whole:
            step.forget()  # what a step that was broken off has left
            self._make_room()
        step.load(passing, [tensors for _, tensors in forms])
        return step

    def end(self) -> None:
        """A step has ended."""
        if self._current is not None:
            self._current.is_whole = self._current.has_graphs
            self._current.has_run = True
            self._current = None

    def give_up(self, why: str) -> None:
        """No graphs from now on."""
        self._has_given_up = True
        self._tell(f"no CUDA graph: {why}")
        self._current = None
        self._release()
        self._make_room()
        self._steps.clear()

    def capture(self, work: Callable[[], None]) -> Any:
        """The graph of `work`."""
        # HAZARD: while a stream is captured torch gives no memory back that is free elsewhere.
        _cuda.empty_cache()
        try:
            with self._standing(), capturing(self._stream, self._pool) as graph:
                work()
        except RuntimeError as error:
            raise CaptureError(first_line(error)) from error
        return graph

    def _release(self) -> None:
        """Let go of all graphs and their memory; forms stay known."""
        if any(step.has_graphs for step in self._steps.values()):
            for step in self._steps.values():
                step.forget()
            self._pool = _cuda.graph_pool_handle()  # the one before goes with its last graph
            self._make_room()

    def _make_room(self) -> None:
        """Give back what earlier steps have left.

        HAZARD: their graphs of autograd lie in circles of references, which only the collector ends. They
        keep the parameters' nodes, which belong to another stream than the one that captures.
        """
        gc.collect()
        _cuda.empty_cache()


class _Place:
    """Fixed memory with the sizes and strides of a tensor: kernels are compiled for those."""

    def __init__(self, source: Tensor) -> None:
        self._memory = torch.empty(_extent(source), dtype=source.dtype, device=source.device)
        self.tensor = self._memory.as_strided(source.size(), source.stride())

    def load(self, source: Tensor) -> None:
        # Whole, with what lies between: an expanded tensor has several elements in one place.
        self._memory.copy_(source.as_strided((self._memory.numel(),), (1,)))


def _extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last one in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _form_of(each: Passing) -> tuple[Any, list[Tensor]]:
    """What micro-batches must have in common to be run by one graph, and the distinct tensors that this one
    runs on, the hidden state first."""
    distinct: dict[Any, BlockCall] = {}
    numbers: dict[Any, int] = {}
    pattern = []
    for call in each.calls:  # most are with the same objects, and need to be looked at once
        objects = (*map(id, call.args), *call.kwargs, *map(id, call.kwargs.values()))
        distinct.setdefault(objects, call)
        pattern.append(numbers.setdefault(objects, len(numbers)))
    calls = list(distinct.values())
    tensors = [each.last, *tensors_of(calls)]
    strides = tuple(tensor.stride() for tensor in tensors)
    return (each.padded, tuple(pattern), form_key(tensors), form_key(calls), strides), tensors


def _why_not(passing: Sequence[Passing], device: torch.device) -> str | None:
    """Why what blocks are called with cannot be put to fixed places; `None`: it can."""
    for each in passing:
        if each.shared:
            return "blocks share a tensor that needs a gradient"
        if any(tensor.device.type != device.type for tensor in tensors_of(each.calls)):
            return "blocks are called with a tensor on the host"
        if not all(_is_plain([call.args, call.kwargs]) for call in each.calls):
            return "blocks are called with objects of another kind than tensors and numbers"
    return None


def _is_plain(value: Any) -> bool:
    """Whether its form says all of it but the values of its tensors."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    plain = Tensor | bool | int | float | str | torch.dtype | torch.device
    return value is None or isinstance(value, plain)
