"""Room for gradients on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engines.cpu_updates.gradient_buffers import GradientBuffers


def test_only_a_place_that_is_not_free_is_waited_for() -> None:
    buffers = GradientBuffers([4, 4], torch.float32, torch.device("cpu"), lambda *_: None)
    waits: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append("begins")
        buffers.give(1)
        yield
        waits.append("ends")

    assert [buffers.take(waiting), buffers.take(waiting)] == [0, 1]
    assert waits == []
    assert buffers.take(waiting) == 1
    assert waits == ["begins", "ends"]
    buffers.close()
