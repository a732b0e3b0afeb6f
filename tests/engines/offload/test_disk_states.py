"""Optimizer states on disk: what was written is read again, in whatever order blocks are asked for."""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.errors import UserError
from engines.offload import disk_states
from engines.offload.disk_states import DiskStates

SIZES = {2: 5000, 3: 70_001, 5: 4096, 8: 1, 9: 12_345}


@given(orders=st.lists(st.permutations(sorted(SIZES)), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_each_block_finds_what_it_left(orders: list[list[int]], seed: int) -> None:
    """Each round adds one to all bytes of a block, in several chunks, while others are read and written."""
    late = random.Random(seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(disk_states, "CHUNK_BYTES", 8192)
        states = DiskStates(SIZES, Path("/tmp"), "setting", delay_s=lambda: late.choice((0.0, 0.0, 0.002)))
        try:
            for number, order in enumerate(orders):
                came: queue.SimpleQueue[tuple[int, Tensor, Any]] = queue.SimpleQueue()
                for block in order:
                    states.request(block, lambda memory, why, b=block, q=came: q.put((b, memory, why)))
                for _ in order:
                    block, memory, why = came.get(timeout=30)
                    assert why is None
                    assert memory.numel() == SIZES[block]
                    assert memory.unique().tolist() == [number]
                    memory.add_(1)
                    states.release(block)
            for block in SIZES:
                with states.borrowed(block, changes=False) as memory:
                    assert memory.unique().tolist() == [len(orders)]
        finally:
            states.close()
            states.close()


def test_of_the_blocks_that_wait_the_first_is_read_first(tmp_path: Path) -> None:
    states = DiskStates(dict.fromkeys(range(8), 100), tmp_path, "setting")
    came: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        for block in (7, 6, 5):  # all places
            states.request(block, lambda memory, why, b=block: came.put(b))
        held = {came.get(timeout=30) for _ in range(3)}
        assert held == {5, 6, 7}
        for block in (4, 3, 1, 2):
            states.request(block, lambda memory, why, b=block: came.put(b))
        order = []
        for block in (7, 6, 5, 1):
            states.release(block)
            order.append(came.get(timeout=30))
        assert order == [1, 2, 3, 4]
    finally:
        states.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*--set method.disk_folder=FOLDER"):
        DiskStates({0: 100}, tmp_path / "file", "method.disk_folder")
