"""CUDA graphs on a CPU, for what is captured and when: a capture takes down each operation of torch and on
which tensors it was, and a replay does the same to the same ones, whatever Python would do by then.

What it cannot show is memory that graphs of one pool share, and the order of streams: those are for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from engines.first_order import captured_passes
from engines.model import block_major_graphs


class FakeGraph:
    """The operations of a capture, in their order."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Of memory that some operation reads or changes: a tensor in it, and what all of it was."""
        self.made: set[int] = set()
        """Memory that the capture made."""

    def keep(self, used: Tensor) -> None:
        """What `used` is before the first operation on it."""
        place = used.untyped_storage().data_ptr()
        if place not in self.before and place not in self.made:
            whole = used.data.as_strided((used.untyped_storage().nbytes() // used.itemsize,), (1,), 0)
            self.before[place] = (whole, whole.clone())

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.operations:
            # `data` has a count of changes of its own: autograd sees nothing of a replay.
            args, kwargs = tree_map_only(Tensor, lambda each: each.data, (args, kwargs))
            for place, made in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                if place.untyped_storage().data_ptr() != made.untyped_storage().data_ptr():
                    place.data.copy_(made)

    def spoil(self) -> None:
        """A capture computes nothing: what it seems to have made is no number, and what it seems to have
        changed is as it was."""
        for _, args, kwargs, results in self.operations:
            known = {each.untyped_storage().data_ptr() for each in _tensors([args, kwargs])}
            for each in results:
                if each.untyped_storage().data_ptr() not in known and each.is_floating_point():
                    each.data.fill_(math.nan)
        for place, was in self.before.values():
            place.copy_(was)


class _TakesDown(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors([args, kwargs]):
            self._graph.keep(tensor)
        found = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors([args, kwargs])}
        self._graph.made |= {each.untyped_storage().data_ptr() for each in _tensors(found)} - given
        self._graph.operations.append((func, args, kwargs or {}, _tensors(found)))
        return found


class FakeCuda:
    """In the place of `torch.cuda`."""

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.fails_at: int | None = None
        """The number of the capture that finds no memory."""

    def graph_pool_handle(self) -> object:
        return object()

    def Stream(self, device: torch.device) -> None:
        return None

    def empty_cache(self) -> None:
        pass

    @contextmanager
    def capturing(self, stream: Any, pool: Any) -> Iterator[FakeGraph]:
        graph = FakeGraph()
        with _TakesDown(graph):
            yield graph
        with torch.no_grad():
            graph.spoil()
        if len(self.graphs) == self.fails_at:
            self.fails_at = None
            raise torch.OutOfMemoryError("no room for a graph\nand more")
        self.graphs.append(graph)


def played(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Graphs of blocks and of whole passes are played from now on."""
    fake = FakeCuda()
    for module in (block_major_graphs, captured_passes):
        monkeypatch.setattr(module, "_cuda", fake)
        monkeypatch.setattr(module, "capturing", fake.capturing)
    return fake


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]
