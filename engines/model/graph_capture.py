"""How work becomes a CUDA graph: on a stream of its own, with nothing that would spoil it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_cuda: Any = torch.cuda  # most of it is without annotations


@contextmanager
def capturing(stream: torch.cuda.Stream, pool: Any) -> Iterator[Any]:
    """The graph of what is enqueued inside, on `stream`, with its memory from `pool`.

    Waits until the device has done all that was enqueued before. What is raised inside is raised, whatever it
    does to the graph.

    HAZARD: a pool goes with its last graph. After an end inside that has left none, the next one needs a new
    pool: on the old one torch fails an assertion of its own, and every draw of random numbers after that.
    """
    graph = _cuda.CUDAGraph()
    torch.cuda.synchronize(stream.device)
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    # HAZARD: Python's collector runs wherever objects are made, and what it frees may be pinned memory or
    # another graph, for which the driver is called: a call that this thread may not make while it captures.
    with torch.cuda.stream(stream), _no_garbage_collection():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:
            # What spoilt the capture is the cause to tell, and not that it has captured nothing.
            with suppress(RuntimeError), warnings.catch_warnings(action="ignore"):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
