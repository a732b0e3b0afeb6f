"""SHA-256 of every file of a folder, in `SHA256SUMS` beside them: `sha256sum -c SHA256SUMS` checks it too.

They are to find a disk or a copy that changed a byte. Whoever changes a file on purpose can change them as
well.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engines.errors import UserError
from engines.files.reading import exists, is_file, open_file, read_text
from engines.files.writing import write_whole

SUMS = "SHA256SUMS"
CHUNK_BYTES = 2**22
MOST_THREADS = 8
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256_of(path: Path) -> str:
    """Of the content, in hexadecimal. Raises `UserError` if it cannot be read."""
    digest = hashlib.sha256()
    with open_file(path, "file") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files in `folder`. Raises `UserError` if it cannot be read or written."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS and path.is_file())
    found = _sums(folder, names)
    write_whole(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in found.items()))


def read_sums(folder: Path) -> dict[str, str] | None:
    """SHA-256 by name of file; `None` where `folder` holds none. Raises `UserError` if they are damaged."""
    if not exists(folder / SUMS):
        return None
    found = {}
    for line in read_text(folder / SUMS, "list of checksums").removesuffix("\n").split("\n"):
        match = _LINE.fullmatch(line)
        if match is None or "/" in match[2] or match[2] in found:
            raise UserError(
                str(folder / SUMS), "is not a list of checksums", "restore it, or the whole folder"
            )
        found[match[2]] = match[1]
    return found


def check_sums(folder: Path, remedy: str, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Whether `folder` holds sums, which its files of a `wanted` name then all have.

    Raises `UserError` that names the first file that is missing or was changed.
    """
    sums = read_sums(folder)
    if sums is None:
        return False
    names = [name for name in sums if wanted(name)]
    missing = next((name for name in names if not is_file(folder / name)), None)
    if missing is not None:
        raise UserError(str(folder / missing), f"is missing, and {SUMS} names it", remedy)
    for name, digest in _sums(folder, names).items():
        if digest != sums[name]:
            raise UserError(str(folder / name), f"is damaged: its SHA-256 is not that of {SUMS}", remedy)
    return True


def _sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))
