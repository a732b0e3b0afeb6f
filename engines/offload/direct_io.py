"""Files of raw weights on local storage, past the page cache. Imports no torch.

Direct I/O (`O_DIRECT`) moves whole, aligned chunks between storage and the caller's memory: the page cache
would take the host memory that the disk is to spare, and a core to copy out of it. A file system that
refuses is used through its cache, which is dropped after each read; `direct` is False then.

Our own files have no name: they are private to this process, and gone however it ends, killed or not, so
there is nothing to clean up. Each is a safetensors file of one tensor of bytes all the same.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ALIGNMENT_BYTES = 4096
"""Of places, lengths and memory in direct I/O; what every common device asks for at most."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_NAMELESS = getattr(os, "O_TMPFILE", 0)


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes of a block that lie together in a file."""

    file: RawFile
    offset_bytes: int
    """In the file."""
    start: int
    """In the block."""
    num_bytes: int


class RawFile:
    """An open file that is read and written in aligned chunks, by several threads at once."""

    def __init__(self, descriptor: int, *, direct: bool) -> None:
        self.direct = direct
        self._descriptor = descriptor

    @property
    def descriptor(self) -> int:
        """Of this process."""
        return self._descriptor

    def read(self, memory: memoryview, offset_bytes: int, needed_bytes: int) -> None:
        """Fill `memory` from a place in the file, its first `needed_bytes` at least.

        Place, length and address are aligned. Raises `OSError`, also where the file ends before.
        """
        done = 0
        while done < needed_bytes:
            count = os.preadv(self._descriptor, [memory[done:]], offset_bytes + done)
            if done + count < needed_bytes and self.direct:
                # HAZARD: a short read may end anywhere, and direct I/O goes on from aligned places only.
                count -= count % ALIGNMENT_BYTES
            if count == 0:
                raise OSError(errno.EIO, "the file ends too early")
            done += count
        if not self.direct:
            self._drop_cache(offset_bytes, done)

    def write(self, memory: memoryview, offset_bytes: int) -> None:
        """All of `memory`, aligned as for `read`. Raises `OSError`."""
        done = 0
        while done < len(memory):
            count = os.pwritev(self._descriptor, [memory[done:]], offset_bytes + done)
            if done + count < len(memory) and self.direct:
                count -= count % ALIGNMENT_BYTES
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count
        if not self.direct:
            os.fdatasync(self._descriptor)
            self._drop_cache(offset_bytes, done)

    def resize(self, num_bytes: int) -> None:
        os.ftruncate(self._descriptor, num_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Take the room now. Raises `OSError` if the disk is too full."""
        try:
            os.posix_fallocate(self._descriptor, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def _drop_cache(self, offset_bytes: int, num_bytes: int) -> None:
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._descriptor, offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def make_file(folder: Path, name: str, num_bytes: int) -> FileSpan:
    """A new nameless file in `folder` with room for `num_bytes` under `name`, and where they lie.

    Raises `OSError` where no file can be made or the disk is too full.
    """
    file = _open_nameless(folder)
    try:
        tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
        header = json.dumps({name: tensor}).encode("utf-8").ljust(ALIGNMENT_BYTES - 8)
        size_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + ALIGNMENT_BYTES
        file.reserve(size_bytes)
        with mmap.mmap(-1, ALIGNMENT_BYTES) as page:
            page.write(len(header).to_bytes(8, "little") + header)
            with memoryview(page) as memory:
                file.write(memory, 0)
    except BaseException:
        file.close()
        raise
    return FileSpan(file, ALIGNMENT_BYTES, 0, num_bytes)


def open_existing(path: Path) -> RawFile:
    """To be read only. Raises `OSError`."""
    if _DIRECT:
        with suppress(OSError):
            return RawFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT), direct=True)
    return RawFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), direct=False)


def open_of_process(pid: int, descriptor: int) -> RawFile:
    """A file that another process of this user has open, to be read and written. Raises `OSError`."""
    path, flags = f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC
    if _DIRECT:
        with suppress(OSError):
            return RawFile(os.open(path, flags | _DIRECT), direct=True)
    return RawFile(os.open(path, flags), direct=False)


def in_memory(folder: Path) -> bool:
    """Whether what is in `folder` takes host memory (tmpfs), which may also call itself direct."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds = (line.partition(" - ")[2].split() for line in mounts if line.split()[2:3] == [number])
    return any(kind[:1] in (["tmpfs"], ["ramfs"]) for kind in kinds)


def _open_nameless(folder: Path) -> RawFile:
    """Past the page cache and without a name from its start on, as far as the file system can."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if _NAMELESS:
        for extra in (_DIRECT, 0):
            with suppress(OSError):
                descriptor = os.open(folder, flags | _NAMELESS | extra, 0o600)
                return RawFile(descriptor, direct=bool(extra))
    handle, name = tempfile.mkstemp(prefix=".lspzo-", dir=folder)  # mode 0600
    try:
        if _DIRECT:
            with suppress(OSError):
                return RawFile(os.open(name, flags | _DIRECT), direct=True)
        return RawFile(os.dup(handle), direct=False)
    finally:
        os.close(handle)
        os.unlink(name)
