"""How fast the file system of one folder writes and reads in sequence, past the page cache where it can."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from engines.errors import UserError
from profiles.machine import Disk, Figure, absent
from profiles.probe.timing import Meter, clock_s, rate_figure
from profiles.system.cgroup import ROOT, read_system_file

BLOCK_BYTES = 8 * 2**20
CHUNK_BLOCKS = 4
"""Blocks of one sample; they are read side by side, and written one after the other."""
FILE_BYTES_AT_MOST = 8 * 2**30
FREE_DISK_SHARE = 10
"""At most this share of what is free is written."""
NUM_MEASUREMENTS = 2


def probe_disk(meter: Meter, folder: Path, root: Path = ROOT) -> tuple[Disk | None, str | None]:
    """The disk, or why there is none. A folder that cannot be written to leaves absent figures.

    The file has no name from its start on, so it is gone however this process ends, and is nobody else's to
    read.
    """
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        meter.skip(NUM_MEASUREMENTS)
        return None, f"{folder}: {error.strerror or error}"
    descriptor, direct, failure = -1, None, ""
    try:
        descriptor, direct = open_nameless(folder)
    except OSError as error:
        failure = error.strerror or str(error)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # page-aligned, as direct I/O asks for
            block.write(os.urandom(BLOCK_BYTES))  # what a file system could neither compress nor skip
            most = min(FILE_BYTES_AT_MOST, usage.free // FREE_DISK_SHARE) // (BLOCK_BYTES * CHUNK_BLOCKS)
            write = meter.optional(
                "disk, writing", _or_raise(failure, descriptor, block, most, _write), absent
            )
            read = meter.optional(
                "disk, reading",
                _or_raise(failure or _why_unread(write), descriptor, block, most, _read),
                absent,
            )
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return Disk(
        folder=str(folder.resolve()),
        file_system=file_system(folder, root),
        total_bytes=usage.total,
        free_bytes=usage.free,
        direct=direct,
        write_bytes_per_s=write,
        read_bytes_per_s=read,
    ), None


def require_measurable_disk(folder: Path) -> None:
    """Raises `UserError` if no disk can be measured in `folder`."""
    try:
        descriptor, _ = open_nameless(folder)
    except OSError as error:
        raise UserError(
            f"--disk {folder}",
            f"no file can be made there ({error.strerror or error})",
            "name a folder that you may write to, on the disk to be measured",
        ) from None
    os.close(descriptor)


def open_nameless(folder: Path) -> tuple[int, bool]:
    """A descriptor of a new file in `folder` without a name, and whether it goes past the page cache.

    Raises `OSError` where no file can be made.
    """
    handle, name = tempfile.mkstemp(prefix=".lspzo-probe-", dir=folder)  # mode 0600
    try:
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            with suppress(OSError):  # such as tmpfs, which has no way past the cache
                return os.open(name, os.O_RDWR | direct), True
        return os.dup(handle), False
    finally:
        os.close(handle)
        os.unlink(name)


def file_system(folder: Path, root: Path = ROOT) -> str | None:
    """The kind of file system that holds `folder`, such as `ext4`; `None` if the kernel does not tell."""
    kinds = {}
    for line in (read_system_file(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        if len(left.split()) > 4 and right.split():
            kinds[left.split()[4]] = right.split()[0]
    place = folder.resolve()
    return next((kinds[str(part)] for part in (place, *place.parents) if str(part) in kinds), None)


Transfer = Callable[[int, mmap.mmap, int, float], list[float]]


def _or_raise(
    failure: str, descriptor: int, block: mmap.mmap, most: int, transfer: Transfer
) -> Callable[[float], Figure]:
    def take(seconds: float) -> Figure:
        if failure:
            raise _Unusable(failure)
        if most < 1:
            raise _Unusable(f"less than {FREE_DISK_SHARE * BLOCK_BYTES * CHUNK_BLOCKS / 1e6:.0f} MB is free")
        samples = transfer(descriptor, block, most, seconds)
        size = BLOCK_BYTES * CHUNK_BLOCKS
        method = f"{len(samples)} x {size / 2**20:.0f} MiB in blocks of {BLOCK_BYTES / 2**20:.0f} MiB"
        return rate_figure(float(size), samples, method)

    return take


class _Unusable(Exception):
    """No figure, for a reason that the message gives."""


def _why_unread(write: Figure) -> str:
    return "" if write.value is not None else f"nothing was written: {write.method}"


def _write(descriptor: int, block: mmap.mmap, most: int, seconds: float) -> list[float]:
    samples: list[float] = []
    start = clock_s()
    while len(samples) < most and (len(samples) < 2 or clock_s() - start < seconds):
        before = clock_s()
        try:
            for _ in range(CHUNK_BLOCKS):
                _whole(os.write(descriptor, block))
            os.fdatasync(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and samples:
                os.ftruncate(descriptor, len(samples) * CHUNK_BLOCKS * BLOCK_BYTES)
                break  # what was written until then is measured
            raise
        samples.append(clock_s() - before)
    return samples


def _read(descriptor: int, block: mmap.mmap, most: int, seconds: float) -> list[float]:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    chunks = min(most, os.fstat(descriptor).st_size // (BLOCK_BYTES * CHUNK_BLOCKS))
    samples: list[float] = []
    start = clock_s()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(CHUNK_BLOCKS))
        blocks = [stack.enter_context(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(CHUNK_BLOCKS)]
        while len(samples) < chunks and (len(samples) < 2 or clock_s() - start < seconds):
            first = len(samples) * CHUNK_BLOCKS
            places = [BLOCK_BYTES * (first + i) for i in range(CHUNK_BLOCKS)]
            before = clock_s()
            # Side by side: a fast disk has its full rate only with several reads in flight.
            for count in pool.map(lambda into, at: os.preadv(descriptor, [into], at), blocks, places):
                _whole(count)
            samples.append(clock_s() - before)
    return samples


def _whole(count: int) -> None:
    """A short transfer means a full disk; direct I/O could not go on from its unaligned end anyway."""
    if count != BLOCK_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
