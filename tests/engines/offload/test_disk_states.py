"""Optimizer states on disk: what was written is read again, in whatever order blocks are asked for."""

from __future__ import annotations

import copy
import itertools
import queue
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from waited_for import until

from engines.errors import UserError
from engines.offload import disk_states
from engines.offload.disk_states import DiskStates
from engines.transfer.pinned import HostSlab

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


def test_a_block_that_is_still_being_written_is_read_when_all_of_it_is_there(tmp_path: Path) -> None:
    """Its write is late; another place of memory is free, so that it could be read at once."""
    called = itertools.count()
    late = 2  # the first block's write: two reads come before it
    states = DiskStates(
        {0: 100, 1: 100}, tmp_path, "setting", delay_s=lambda: 0.3 if next(called) == late else 0.0
    )
    came: queue.SimpleQueue[tuple[int, Tensor]] = queue.SimpleQueue()
    try:
        for block in (0, 1):
            states.request(block, lambda memory, why, b=block: came.put((b, memory)))
        held = dict(came.get(timeout=30) for _ in range(2))
        held[0].fill_(7)
        states.release(0)
        until(lambda: next(copy.copy(called)) > late)
        states.release(1)
        states.request(0, lambda memory, why: came.put((0, memory)))
        assert came.get(timeout=30)[1].unique().tolist() == [7]
        head = HostSlab(4096, torch.device("cpu")).view(0, (4096,), torch.uint8)
        reader = threading.Thread(target=lambda: states.read_head(0, head))
        reader.start()
        reader.join(timeout=0.2)
        assert reader.is_alive(), "the block's next update is still to be written"
        states.release(0)
        reader.join(timeout=30)
        assert head[:100].unique().tolist() == [7]
    finally:
        states.close()
