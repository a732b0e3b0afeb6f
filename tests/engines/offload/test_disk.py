"""Blocks on disk through the host's ring: what comes up is what was written, whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.costs.resources import disk as costs
from engines.errors import InfeasiblePlan, UserError
from engines.noise.visits import LOG_CAPACITY
from engines.offload import disk
from engines.offload.direct_io import ALIGNMENT_BYTES, FileSpan, RawFile, make_file, open_existing
from engines.offload.disk import DiskBlocks
from engines.offload.disk_files import BlockFiles, PageCacheWarning
from engines.transfer.link import Event, Link

pytestmark = pytest.mark.filterwarnings(
    "ignore::engines.offload.disk_files.PageCacheWarning"
)  # wherever /tmp may be
CPU = torch.device("cpu")
REAL_PREADV, REAL_PWRITEV, REAL_OPEN = os.preadv, os.pwritev, os.open


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes are many reads."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2 * ALIGNMENT_BYTES)
    monkeypatch.setattr(costs, "SLOTS", 3)


def values(num_bytes: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def blocks_on(
    folder: Path, sizes: dict[int, int], delay_s: Any = None, link: Link | None = None, **where: Any
) -> DiskBlocks:
    files = BlockFiles(sizes, folder, **where)
    return DiskBlocks(files, link or Link(CPU), lambda *_: None, delay_s=delay_s)


def whole(sizes: dict[int, int]) -> list[disk.ByteRange]:
    return [(index, 0, size) for index, size in sizes.items()]


def next_chunk(blocks: DiskBlocks, num_bytes: int) -> Tensor:
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    while blocks.send(out, (), "chunk") is None:
        blocks.wait()
    return out


def three_passes(blocks: DiskBlocks, num_bytes: int) -> None:
    for _ in range(3):
        next_chunk(blocks, num_bytes)


def filled(folder: Path, sizes: dict[int, int], **how: Any) -> tuple[DiskBlocks, dict[int, Tensor]]:
    blocks = blocks_on(folder, sizes, **how)
    contents = {index: values(size, index) for index, size in sizes.items()}
    for index, content in contents.items():
        blocks.fill(index, content)
    blocks.set_order(whole(sizes))
    return blocks, contents


def test_as_many_updates_are_replayed_as_the_log_holds() -> None:
    assert costs.REPLAYED_UPDATES == LOG_CAPACITY


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.lists(st.integers(1, 30_000), min_size=1, max_size=4), min_size=1, max_size=4),
    passes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pieces_of_any_size_come_up_in_order_pass_after_pass(
    tmp_path: Path, cuts: list[list[int]], passes: int, seed: int
) -> None:
    sizes = {3 * number: sum(chunks) for number, chunks in enumerate(cuts)}
    delays = random.Random(seed)
    blocks, contents = filled(tmp_path, sizes, delay_s=lambda: delays.choice((0.0, 0.0, 0.001)))
    order: list[disk.ByteRange] = []
    for index, chunks in zip(sizes, cuts, strict=True):
        start = 0
        for size in chunks:
            order.append((index, start, start + size))
            start += size
    blocks.set_order(order)
    try:
        for _ in range(passes):
            for index, start, stop in order:
                assert torch.equal(next_chunk(blocks, stop - start), contents[index][start:stop])
    finally:
        blocks.close()


def test_no_more_is_read_ahead_than_there_are_slots(tmp_path: Path) -> None:
    sizes = {0: 20 * ALIGNMENT_BYTES}
    blocks, contents = filled(tmp_path, sizes)
    reads: Counter[int] = Counter()
    read = RawFile.read

    def counted(file: RawFile, memory: memoryview, offset_bytes: int, needed_bytes: int) -> None:
        reads[offset_bytes] += 1
        read(file, memory, offset_bytes, needed_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RawFile, "read", counted)
        out = torch.zeros(sizes[0], dtype=torch.uint8)
        while blocks.send(out, (), "chunk") is None:
            blocks.wait()
        blocks.rewind()  # waits for what is being read ahead
        chunks = 11  # of two pages each, but for the first, which begins behind the header
        assert chunks <= sum(reads.values()) <= chunks + costs.SLOTS
    assert torch.equal(out, contents[0])
    blocks.close()


def test_a_slot_is_not_read_into_before_its_upload_has_ended(tmp_path: Path) -> None:
    """With a link whose copies are made when somebody waits for them, and not before."""

    class LateLink(Link):
        copies: dict[Event, tuple[Tensor, Tensor]]
        lock = threading.Lock()

        def upload(self, host: Tensor, out: Tensor, after: Any = None, name: str = "") -> Event:
            event = Event()
            self.copies[event] = (host, out)
            return event

        def host_wait(self, event: Event) -> None:
            with self.lock:
                copy = self.copies.pop(event, None)
                if copy is not None:
                    copy[1].copy_(copy[0])

        def synchronize(self) -> None:
            for event in list(self.copies):
                self.host_wait(event)

    link = LateLink(CPU)
    link.copies = {}
    sizes = {0: 50_000, 1: 30_000}
    blocks = blocks_on(tmp_path, sizes, link=link)
    contents = {index: values(size, index) for index, size in sizes.items()}
    for index, content in contents.items():
        blocks.fill(index, content)
    blocks.set_order(whole(sizes))
    outs = []
    for index, size in [*sizes.items(), *sizes.items()]:
        outs.append((index, next_chunk(blocks, size)))
    link.synchronize()
    for index, out in outs:
        assert torch.equal(out, contents[index])
    blocks.close()


def test_a_second_file_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    sizes = {0: 20_000, 1: 9_000}
    blocks, contents = filled(tmp_path, sizes, written_back=sizes)
    base = blocks.files.own[0]
    changed = values(sizes[0], seed=77)
    blocks.rewind()
    blocks.write_back(0, changed)
    blocks.rewind()
    assert torch.equal(next_chunk(blocks, sizes[0]), changed)
    assert torch.equal(next_chunk(blocks, sizes[1]), contents[1])
    blocks.rewind()
    out = torch.zeros(sizes[0], dtype=torch.uint8)
    blocks.fetch(0, out)
    assert torch.equal(out, changed)
    with safe_open(f"/proc/self/fd/{base.file.descriptor}", framework="pt") as file:
        assert torch.equal(file.get_tensor("block.0"), contents[0])
    blocks.close()


def test_files_are_private_nameless_and_safetensors(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    blocks, contents = filled(folder, {4: 12_345})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    descriptor = blocks.files.own[4].file.descriptor
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
    assert os.fstat(descriptor).st_nlink == 0
    with safe_open(f"/proc/self/fd/{descriptor}", framework="pt") as file:
        assert list(file.keys()) == ["block.4"]
        assert torch.equal(file.get_tensor("block.4"), contents[4])
    blocks.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    blocks.close()


def test_a_block_in_a_file_of_somebody_else_is_read_there(tmp_path: Path) -> None:
    """Its tensors lie anywhere, in another order, and the file is never written."""
    tensors = {"b": values(10_001, 1), "a": values(5_003, 2), "pad": values(7, 3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    before = path.read_bytes()
    header_bytes = 8 + int.from_bytes(before[:8], "little")
    file = open_existing(path)
    spans, start = [], 0
    for name in ("a", "b"):
        at = before.index(tensors[name].numpy().tobytes())
        assert at >= header_bytes
        spans.append(FileSpan(file, at, start, tensors[name].numel()))
        start += tensors[name].numel()
    folder = tmp_path / "spill"
    blocks = blocks_on(folder, {0: start}, in_place={0: spans})
    blocks.set_order([(0, 0, start)])
    assert blocks.holds(0)
    expected = torch.cat((tensors["a"], tensors["b"]))
    for _ in range(2):
        assert torch.equal(next_chunk(blocks, start), expected)
    blocks.rewind()
    blocks.write_back(0, expected.flip(0))
    blocks.rewind()
    assert torch.equal(next_chunk(blocks, start), expected.flip(0))
    blocks.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("most", [1, ALIGNMENT_BYTES, ALIGNMENT_BYTES + 1000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_and_writes_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, direct: bool
) -> None:
    """Direct I/O goes on from an aligned place, and gives up where it does not get that far."""
    span = make_file(tmp_path, "block", 6 * ALIGNMENT_BYTES)
    file, offset = RawFile(span.file.descriptor, direct=direct), span.offset_bytes
    source, target = torch.zeros(2, 6 * ALIGNMENT_BYTES + ALIGNMENT_BYTES, dtype=torch.uint8)
    source, target = (
        memory[-memory.data_ptr() % ALIGNMENT_BYTES :][: 6 * ALIGNMENT_BYTES] for memory in (source, target)
    )
    source.copy_(values(6 * ALIGNMENT_BYTES))
    unaligned: list[int] = []

    def short(transfer: Any) -> Any:
        def limited(descriptor: int, memory: Sequence[memoryview], at: int) -> int:
            unaligned.extend([at] if at % ALIGNMENT_BYTES else [])
            return int(transfer(descriptor, [memory[0][:most]], at))

        return limited

    descriptor = os.open(f"/proc/self/fd/{span.file.descriptor}", os.O_RDWR)  # which takes any length
    file = RawFile(descriptor, direct=direct)
    monkeypatch.setattr(os, "preadv", short(REAL_PREADV))
    monkeypatch.setattr(os, "pwritev", short(REAL_PWRITEV))
    if direct and most < ALIGNMENT_BYTES:
        with pytest.raises(OSError, match="too early"):
            file.read(target.numpy().data, offset, 6 * ALIGNMENT_BYTES)
    else:
        file.write(source.numpy().data, offset)
        file.read(target.numpy().data, offset, 6 * ALIGNMENT_BYTES)
        assert torch.equal(source, target)
    assert not (direct and unaligned)
    file.close()
    span.file.close()


def test_a_file_that_ends_early_is_an_error_not_a_loop(tmp_path: Path) -> None:
    blocks, _ = filled(tmp_path, {0: 60_000})
    blocks.files.own[0].file.resize(30_000)
    with pytest.raises(UserError, match=r"cannot be read \(the file ends too early\)"):
        next_chunk(blocks, 60_000)
    blocks.close()


@pytest.mark.parametrize("nth", [0, 5])
def test_a_reader_that_fails_ends_the_run_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    blocks, _ = filled(tmp_path, {0: 60_000})
    left = [nth]

    def failing(descriptor: int, memory: Sequence[memoryview], at: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return REAL_PREADV(descriptor, memory, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\); name a folder"):
        three_passes(blocks, 60_000)
    blocks.close()


def test_a_disk_that_is_full_while_it_is_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_on(tmp_path, {0: 60_000})

    def full(descriptor: int, memory: Sequence[memoryview], at: int) -> int:
        if at > 3 * ALIGNMENT_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return REAL_PWRITEV(descriptor, memory, at)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        blocks.fill(0, values(60_000))
    blocks.close()


@pytest.mark.parametrize("folds", [False, True])
def test_a_disk_that_is_too_small_is_refused_with_what_is_missing(tmp_path: Path, folds: bool) -> None:
    size = 10**15
    with pytest.raises(InfeasiblePlan) as refused:
        blocks_on(tmp_path, {0: size, 1: size}, written_back=range(2) if folds else ())
    told = str(refused.value)
    needed = (4 if folds else 2) * size
    assert f"2 blocks take {needed / 1e9:.3g} GB" in told
    assert "GB of disk are missing in" in told
    assert ("GB, second files for folded updates included" in told) == folds
    assert list(tmp_path.iterdir()) == []


def test_room_that_turns_out_not_to_be_there_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota is, which the free space does not tell of."""

    def refused(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", refused)
    with pytest.raises(InfeasiblePlan, match="or a quota is"):
        blocks_on(tmp_path, {0: 1000})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        blocks_on(in_the_way / "spill", {0: 1000})
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:  # whom no mode stops
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot be used \(Permission denied\); name a folder"):
            blocks_on(read_only, {0: 1000})
    finally:
        os.seteuid(user)


@pytest.fixture
def _no_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return REAL_OPEN(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.usefixtures("_no_direct_io")
def test_where_direct_io_is_refused_the_page_cache_is_used_and_told_of(tmp_path: Path) -> None:
    with pytest.warns(PageCacheWarning, match="refuses direct I/O"):
        blocks, contents = filled(tmp_path, {0: 50_000})
    assert not blocks.direct
    assert torch.equal(next_chunk(blocks, 50_000), contents[0])
    blocks.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_a_disk_that_is_memory_is_told_of() -> None:
    with pytest.warns(PageCacheWarning, match="it is in host memory"):
        blocks, contents = filled(Path("/dev/shm"), {0: 50_000})
    assert not blocks.direct
    assert torch.equal(next_chunk(blocks, 50_000), contents[0])
    blocks.close()


def test_without_nameless_files_a_name_is_taken_away_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.offload.direct_io._NAMELESS", 0)
    blocks, contents = filled(tmp_path, {0: 50_000})
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(next_chunk(blocks, 50_000), contents[0])
    blocks.close()


def test_the_depth_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST_TRIED_BYTES", 100_000)
    monkeypatch.setattr(disk, "TRY_S", 0.02)
    blocks, contents = filled(tmp_path, {0: 150_000})
    assert blocks.rate_bytes_per_s is None
    blocks.choose_depth()
    assert blocks.rate_bytes_per_s is not None
    assert blocks.rate_bytes_per_s > 0
    assert torch.equal(next_chunk(blocks, 150_000), contents[0])
    assert blocks.take_busy_s() > 0
    blocks.close()


def test_closing_while_reads_wait_does_not_hang(tmp_path: Path) -> None:
    blocks, _ = filled(tmp_path, {0: 60_000}, delay_s=lambda: 0.05)
    blocks.send(torch.zeros(60_000, dtype=torch.uint8), (), "chunk")
    blocks.close()
    blocks.close()


def test_blocks_on_disk_are_spread_and_as_few_as_need_be() -> None:
    assert costs.evenly_spread(range(8), 2) == {2, 6}
    assert costs.evenly_spread([1, 5, 9], 99) == {1, 5, 9}
    assert costs.evenly_spread([], 3) == frozenset()
    ring = costs.SLOTS * costs.CHUNK_BYTES
    block = 10 * ring
    assert costs.fewest_on_disk([block] * 8, 8 * block) == 0
    assert costs.fewest_on_disk([block] * 8, 8 * block - 1) == 1
    assert costs.fewest_on_disk([block] * 8, 6 * block + ring) == 2
    assert costs.fewest_on_disk([block] * 8, 6 * block + ring - 1) == 3
    assert costs.fewest_on_disk([block] * 8, 0) == 8


@pytest.mark.gpu
def test_pinned_slots_and_real_copies(tmp_path: Path) -> None:
    """Many passes with a disk that is late at random; every upload is checked once it has ended."""
    device = torch.device("cuda:0")
    delays = random.Random(0)
    link = Link(device, lambda: delays.randrange(200_000))
    sizes = {0: 100_000, 1: 70_001}
    blocks = blocks_on(tmp_path, sizes, lambda: delays.choice((0.0, 0.0, 0.002)), link)
    assert blocks.pinned_bytes == costs.host_ring_bytes(sum(sizes.values()))
    contents = {index: values(size, index).to(device) for index, size in sizes.items()}
    for index, content in contents.items():
        blocks.fill(index, content)
    blocks.set_order(whole(sizes))
    buffer, used = torch.zeros(100_000, dtype=torch.uint8, device=device), link.record()
    for _ in range(20):
        for index, size in sizes.items():
            while (arrived := blocks.send(buffer[:size], (used,), "chunk")) is None:
                blocks.wait()
            link.wait(arrived)
            assert torch.equal(buffer[:size], contents[index])
            buffer.fill_(255)
            used = link.record()
    link.synchronize()
    blocks.close()
