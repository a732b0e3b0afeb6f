"""The folder of a command's results where none is named."""

from __future__ import annotations

import atexit
from contextlib import suppress
from itertools import count
from pathlib import Path

from engines.errors import UserError
from engines.files.reading import exists
from profiles.documents import check_folder_writable


def results_folder(out: Path | None, what: str, model: str, resume: bool, *, dry_run: bool = False) -> Path:
    """`out`, else a new folder below `out/`, so that one run's results never meet another's: it is made at
    once, as another command may be started beside this one, and goes again at the end if it stayed empty.

    Raises `UserError` if it cannot be made or `out` not be written, and for `resume` without `out`.
    """
    if out is not None:
        if not dry_run:
            check_folder_writable(out, "free space or name another --out")
        return out
    if resume:
        raise UserError("--resume", "does not say what to go on with", "name the folder with --out")
    for number in count(1):
        folder = Path("out") / f"{what}_{Path(model).name}_{number:03d}"
        if exists(folder):
            continue
        if dry_run:
            break
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                str(folder), f"cannot be written ({error.strerror})", "name another --out"
            ) from None
        atexit.register(_remove_if_empty, folder)
        break
    return folder


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
