"""JSON documents with a schema version: read with a clear error, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from engines.errors import UserError

T = TypeVar("T")

ELSEWHERE = "free space or name another place"
"""What to do where a file cannot be written."""


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(str(path), f"there is no such {what}", "check the path") from None
    except IsADirectoryError:
        raise UserError(str(path), f"is a folder, not a {what}", "name the file") from None
    except PermissionError:
        raise UserError(str(path), f"this {what} may not be read", "change its permissions") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"is not valid JSON ({error})", f"restore or delete this {what}") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(found, int):
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
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            str(path), f"field '{where}': {first['msg']}", f"restore or delete this {what}"
        ) from None


def to_json(document: Any) -> str:
    """Readable JSON of a dataclass or a tuple of them, all of one class; NaN and infinity become null."""
    kind: Any = type(document)
    if isinstance(document, tuple) and document:
        kind = tuple[type(document[0]), ...]  # type: ignore[misc]
    return adapter(kind).dump_json(document, indent=1).decode("utf-8") + "\n"


def check_writable(path: Path, *, is_folder: bool = False, remedy: str = ELSEWHERE) -> None:
    """Raises `UserError` if no file, or no folder, can be written at `path`: before the work whose result
    goes there. Makes the folders above it."""
    try:
        if path.is_dir() and not is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error, remedy) from None


def _unwritable(path: Path, error: OSError, remedy: str) -> UserError:
    return UserError(str(path), f"cannot be written ({error.strerror or error})", remedy)


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one.

    Raises `UserError` if the disk is full or the folder may not be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _unwritable(path, error, ELSEWHERE) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
