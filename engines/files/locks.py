"""One process at a time writes into a folder of results."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import UserError
from engines.files.writing import unwritable


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there, against every other process that asks for it.

    The lock is on the folder itself (flock), leaves nothing behind and ends with the process, however it
    ends. A file system without locks holds nobody off. Raises `UserError` if another process has it, or if
    the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise unwritable(folder, error, "name another --out") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    str(folder),
                    "another process writes into this folder",
                    "wait for it, or name another --out",
                ) from None
        yield
    finally:
        os.close(descriptor)
