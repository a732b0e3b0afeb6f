"""The one place where results are written: whole or not at all, with the modes that the umask leaves.

What is being written has a name of its own (`TEMPORARY`), so that what a kill leaves is known as that and
cleared at the next start. It goes to the disk before it takes its place, and the place after it: a power cut
leaves the old file or the new one, never an empty one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engines.errors import UserError

TEMPORARY = ".lspzo-tmp-"
"""Begins the name of whatever is not yet whole."""
_EARLIER = re.compile(
    r"\.(job\.toml|engine\.json|log\.jsonl|updates\.log|plans\.json|machine\.json|criteria\.toml|find_lr\.json"
    r"|trace\.json|report\.(md|html)|verdict\.json|model|export-step-\d+)\.[a-z0-9_]{8}"
)
"""Names of temporary files of versions before 0.2, below which nothing else is called so."""

ELSEWHERE = "free space or name another place"
"""What to do where a file cannot be written."""


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a killed process had begun to write."""
    return name.startswith(TEMPORARY) or _EARLIER.fullmatch(name) is not None


def clear_leftovers(folder: Path) -> None:
    """Take away what killed processes had begun to write in `folder`, not below it.

    Only for one that holds the folder's lock: another's unfinished file looks the same. What cannot be
    taken away stays.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not is_leftover(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def unwritable(path: Path, error: Exception, remedy: str = ELSEWHERE) -> UserError:
    """The line for an `OSError` (or another's) of writing `path`."""
    return UserError(str(path), f"cannot be written ({getattr(error, 'strerror', None) or error})", remedy)


def write_whole(path: Path, content: str | bytes, remedy: str = ELSEWHERE) -> None:
    """Write `content`, text as UTF-8, so that `path` holds either its old content or all of the new one.

    Makes the folders above it. Raises `UserError` if the disk is full or the folder may not be written.
    """
    with whole_file(path, remedy) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


@contextmanager
def whole_file(path: Path, remedy: str = ELSEWHERE, *, reserve_bytes: int = 0) -> Iterator[BinaryIO]:
    """A file to write; at the end it takes the place of `path`, unless an exception ends it.

    The disk's room for its first `reserve_bytes` is taken at once, so that no more can fail for want of it
    where the file system can promise that. Raises `UserError` as `write_whole` does.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_name(path.parent)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            if reserve_bytes:
                _reserve(descriptor, reserve_bytes)
            yield file
            file.flush()
            if reserve_bytes:
                os.ftruncate(descriptor, file.tell())
            os.fsync(descriptor)
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error, remedy) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files into; at the end it takes the place of `folder`, which is not there or is
    empty, unless an exception ends it.

    All its files get the mode that the umask leaves, whatever wrote them. Raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_name(folder.parent)
    try:
        os.mkdir(temporary, 0o777)
        yield temporary
        settle(temporary)
        os.replace(temporary, folder)  # on POSIX this takes the place of an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def settle(folder: Path) -> None:
    """Bring the files of `folder` to the disk, each with the mode that the umask left `folder` itself.

    Libraries that write for us have modes of their own: safetensors makes files that only the user reads.
    Raises `OSError`.
    """
    mode = os.stat(folder).st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            os.chmod(path, mode)
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """To the disk: or a power cut after a rename would leave an empty file under a final name.

    Raises `OSError`, but for a folder of a file system that cannot bring folders there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _new_name(folder: Path) -> Path:
    return folder / f"{TEMPORARY}{secrets.token_hex(6)}"


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Raises `OSError` if there is no room for them."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""A file system that cannot promise room."""
