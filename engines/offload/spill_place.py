"""The folder in which files of a run lie that nobody else opens, and what is said where it does not do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.errors import InfeasiblePlan, UserError


def spill_folder(named: str, setting: str = "zo2.disk_folder") -> Path:
    """The folder that `setting` named, or the default: one place for each user, in the user's cache.

    Raises `UserError` if there is no folder to make the named one in.
    """
    if named:
        folder = Path(named).expanduser()
        if not folder.parent.is_dir():
            raise UserError(
                f"--set {setting}={named}",
                f"there is no folder {folder.parent}",
                "make it, or name another",
            )
        return folder
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lspzo-bench" / "spill"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpillPlace:
    folder: Path
    setting: str
    """The one that names it, such as `zo2.disk_folder`."""

    @contextmanager
    def taken(self, num_bytes: int, what: str, give_up: Callable[[], None]) -> Iterator[None]:
        """Within it files are made that take so many bytes in all; `what` says for a user what takes them.

        After an error `give_up` closes what there is. Raises `InfeasiblePlan` with what is missing where the
        disk is too small, and `UserError` where the folder cannot be used.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.folder).free
            if num_bytes > free_bytes:
                missing = f"{(num_bytes - free_bytes) / 1e9:.3g} GB of disk are missing"
                raise InfeasiblePlan(self._too_small(missing, what))
            yield
        except OSError as error:
            give_up()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                missing = "the disk is too small, or a quota is"
                raise InfeasiblePlan(self._too_small(missing, what)) from None
            raise self.unusable("cannot be used", error) from None
        except BaseException:
            give_up()
            raise

    def _too_small(self, missing: str, what: str) -> str:
        return (
            f"{missing} in {self.folder}: {what}; free disk space, or name another folder with "
            f"--set {self.setting}=FOLDER"
        )

    def unusable(self, why: str, error: OSError) -> UserError:
        return UserError(
            str(self.folder),
            f"{why} ({error.strerror or error})",
            f"name a folder on a sound local disk with --set {self.setting}=FOLDER",
        )
