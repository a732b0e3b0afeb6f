"""Blocks on disk that ranks read once for all: each gets what it needs, whoever reads and whoever is late."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import SideBySideWorld, side_by_side
from torch import Tensor

from engines.costs.resources import disk as costs
from engines.errors import InfeasiblePlan, NotAvailable, PeerLost
from engines.offload.direct_io import ALIGNMENT_BYTES
from engines.offload.disk_chunks import ByteRange
from engines.offload.shared_disk import SharedDisk
from engines.transfer.link import Link

pytestmark = pytest.mark.filterwarnings(
    "ignore::engines.offload.disk_files.PageCacheWarning"
)  # wherever /tmp may be
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes are many reads."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2 * ALIGNMENT_BYTES)
    monkeypatch.setattr(costs, "SLOTS", 6)


def values(num_bytes: int, seed: int) -> Tensor:
    return torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def shared(
    world: SideBySideWorld, folder: Path, sizes: dict[int, int], seed: int | None = None
) -> SharedDisk:
    delays = random.Random(seed)
    return SharedDisk(
        sizes, folder, Link(CPU), lambda *_: None, world, written_back=sizes, in_place={},
        delay_s=None if seed is None else lambda: delays.choice((0.0, 0.0, 0.001)),
    )  # fmt: skip


def next_range(disk: SharedDisk, num_bytes: int) -> Tensor:
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    while disk.send(out, (), "range") is None:
        disk.wait()
    return out


@pytest.mark.parametrize("seed", range(6))
def test_every_rank_gets_every_range_in_order_whatever_the_others_do(tmp_path: Path, seed: int) -> None:
    """Passes by all, after which each sends as much ahead as it happens to and goes alone or not; blocks are
    written anew now and then, each by one of them."""
    drawn = random.Random(seed)
    ranks = drawn.choice((2, 3))
    sizes = {i: drawn.randrange(1, 5 * 2 * ALIGNMENT_BYTES) for i in range(3)}
    order: list[ByteRange] = []
    for block, size in sizes.items():
        cuts = sorted({0, size, *(drawn.randrange(size + 1) for _ in range(2))})
        order += [(block, begin, end) for begin, end in pairwise(cuts)]
    changes = {number: drawn.sample(sorted(sizes), 2) for number in (2, 5)}

    def act(world: SideBySideWorld) -> None:
        mine = random.Random(100 * seed + world.rank)
        contents = {block: values(size, block) for block, size in sizes.items()}
        disk = shared(world, tmp_path, sizes, seed=world.rank)

        def check(number: int) -> None:
            block, begin, end = order[number % len(order)]
            assert torch.equal(next_range(disk, end - begin), contents[block][begin:end])

        try:
            for block in contents:
                if block % world.size == world.rank:
                    disk.fill(block, contents[block])
            disk.set_order(order)
            world.barrier()
            disk.choose_depth()
            ahead = 0
            disk.rewind(0)
            for number in range(8):
                if number in changes:
                    disk.rest()
                    disk.rewind(number)
                    disk.meet()
                    ahead = 0
                    for turn, block in enumerate(changes[number]):
                        contents[block] = values(sizes[block], 1000 * number + block)
                        if turn % world.size == world.rank:
                            disk.write_back(block, contents[block])
                    disk.rewind(number)
                disk.start(number)
                for place in range(ahead, len(order)):
                    check(place)
                # Here it waits for what it sends ahead, so the others have to come there, too.
                ahead = 0 if number + 1 in (*changes, 8) else mine.randrange(len(order))
                for place in range(ahead):
                    check(place)
                if mine.random() < 0.5:  # as when it evaluates, or looks at a block
                    disk.rewind(None)
                    for place in range(mine.randrange(2 * len(order))):
                        check(place)
                    block = mine.choice(sorted(sizes))
                    out = torch.zeros(sizes[block], dtype=torch.uint8)
                    disk.fetch(block, out)
                    assert torch.equal(out, contents[block])
                    disk.rewind(number + 1)
                    ahead = 0
            world.barrier()
        finally:
            disk.close()

    side_by_side(ranks, act)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_ends_is_heard_of_by_those_that_wait_for_its_reads(tmp_path: Path) -> None:
    ends: list[int] = []

    def act(world: SideBySideWorld) -> None:
        sizes = {0: 40 * ALIGNMENT_BYTES}
        disk = shared(world, tmp_path, sizes)
        try:
            if world.rank == 0:
                disk.fill(0, values(sizes[0], 0))
            disk.set_order([(0, 0, sizes[0])])
            disk.rewind(0)
            disk.start(0)
            if world.rank == 0:
                time.sleep(0.05)
                return
            with pytest.raises(PeerLost):
                next_range(disk, sizes[0])
            ends.append(world.rank)
        finally:
            disk.close()

    side_by_side(3, act)
    assert sorted(ends) == [1, 2]


def test_a_disk_that_is_too_small_is_refused_on_all(tmp_path: Path) -> None:
    def act(world: SideBySideWorld) -> None:
        kind = InfeasiblePlan if world.rank == 0 else NotAvailable
        with pytest.raises(kind, match="GB of disk are missing in") as refused:
            shared(world, tmp_path, {0: 10**15})
        assert world.rank == 0 or str(refused.value).startswith("rank 0: ")

    side_by_side(2, act)
    assert list(tmp_path.iterdir()) == []


def test_the_ring_of_ranks_is_no_larger_than_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SLOTS", 64)
    for ranks in (2, 4, 8):
        of_all, own = costs.num_slots_of_ranks(10**12, ranks)
        assert of_all + ranks * own == 64
        assert of_all >= 32
        assert own == 4
    assert costs.num_slots_of_ranks(1, 4) == (2, 1)
