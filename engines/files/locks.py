"""Folders that belong to one process as long as it lives: one of results, or one of its own.

Locks are on the folders themselves (flock): they leave nothing behind and end with the process, however it
ends. Unlike a process's number they mean the same to another container that sees the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import UserError
from engines.files.writing import unwritable

OWN = ".lspzo-own-"
"""Begins the name of a folder of `own_folder`."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there, against every other process that asks for it.

    A file system without locks holds nobody off. Raises `UserError` if another process has it, or if the
    folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _opened(folder)
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


@contextmanager
def own_folder(place: Path | None = None) -> Iterator[Path]:
    """A new folder in `place`, by default among temporary files, for this process alone; gone at the end.

    Those that this user's killed processes left there are taken away before. Raises `OSError` where none can
    be made.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    _take_away_unowned(place)
    folder, descriptor = _new_locked(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _new_locked(place: Path) -> tuple[Path, int]:
    """A folder and the descriptor that holds it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=OWN, dir=place))
        # HAZARD: until it is locked it looks like one of a killed process, and another may take it away.
        with contextlib.suppress(FileNotFoundError):
            descriptor = _opened(folder)
            with contextlib.suppress(OSError):  # a file system without locks, where nobody takes folders away
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _take_away_unowned(place: Path) -> None:
    """Folders of `own_folder` in `place` that no process holds any more; what cannot be taken away stays."""
    for path in place.glob(f"{OWN}*"):
        with contextlib.suppress(OSError):
            descriptor = _opened(path, os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _opened(folder: Path, flags: int = 0) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
