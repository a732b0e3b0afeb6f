"""JSON documents with a schema version: read with a clear error, written whole or not at all."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from engines.errors import UserError, plainly
from engines.files.reading import exists, is_folder, read_json, without_controls
from engines.files.writing import ELSEWHERE as ELSEWHERE
from engines.files.writing import TEMPORARY, unwritable
from engines.files.writing import write_whole as write_whole

T = TypeVar("T")


class NewerDocument(UserError):
    """A document that a newer version of the program wrote: not broken, so never to be written over."""


def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's reader and writer of a dataclass: made once, since making one takes milliseconds."""
    return _adapter(kind)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_document(path: Path, kind: type[T], version: int, what: str) -> T:
    """The dataclass `kind` stored at `path`.

    `what` names the document for the user, such as 'machine profile'. Raises `UserError` if the file
    is missing, is not JSON, was written by a newer version (`NewerDocument`) or does not have the fields of
    `kind`.
    """
    data = without_controls(read_json(path, what))
    found = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        raise UserError(str(path), f"has no schema_version, so it is not a {what}", "check the path")
    if found > version:
        raise NewerDocument(
            str(path),
            f"has schema version {found}, this program knows up to {version}",
            "update lspzo-bench",
        )
    try:
        document: T = adapter(kind).validate_python(data)
        return document
    except (ValidationError, UserError, OverflowError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(str(path), str(error), f"restore or delete this {what}") from None
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            str(path), f"field '{where}' {plainly(first['msg'])}", f"restore or delete this {what}"
        ) from None


def to_json(document: Any) -> str:
    """Readable JSON of a dataclass or a tuple of them, all of one class; NaN and infinity become null."""
    kind: Any = type(document)
    if isinstance(document, tuple) and document:
        kind = tuple[type(document[0]), ...]  # type: ignore[misc]
    return adapter(kind).dump_json(document, indent=1).decode("utf-8") + "\n"


def check_folder_writable(folder: Path, remedy: str = ELSEWHERE) -> None:
    """Raises `UserError` if nothing can be written into `folder`, or into the nearest one above it where it
    is not there yet, or if a file is in its place: before the work whose results go there. Leaves nothing
    behind."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if exists(each))
    if not is_folder(nearest):
        raise UserError(str(nearest), "is a file, and a folder is needed", "name another --out")
    try:
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=nearest, buffering=0) as file:
            file.write(bytes(mmap.PAGESIZE))  # a full disk still takes an empty file
    except OSError as error:
        raise unwritable(folder, error, remedy) from None


def check_writable(path: Path, *, is_folder: bool = False, remedy: str = ELSEWHERE) -> None:
    """Raises `UserError` if no file, or no folder, can be written at `path`: before the work whose result
    goes there. Makes the folders above it."""
    try:
        if path.is_dir() and not is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=path.parent):
            pass
        os.stat(path)  # a name may be too long where the folder is sound
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unwritable(path, error, remedy) from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of both, nested ones too; those of `over` win."""
    found = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
