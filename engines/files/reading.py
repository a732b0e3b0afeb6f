"""The one place where files from elsewhere are read: what kind they may be, how large, how deep.

A file that a user names, or that lies in a folder from elsewhere, may be anything: a FIFO that never ends, a
device, gigabytes of brackets, a number of ten thousand digits. Each is a `UserError` here, and nothing waits.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engines.errors import UserError

MOST_BYTES = 256 * 2**20
"""Of a document that is read as a whole; a run of a million steps is about half of it."""
MOST_SETTINGS_BYTES = 2**20
"""Of a file that a person writes: a job, criteria."""
MOST_DEPTH = 64
"""Of lists and tables within each other."""
MOST_NUMBER = 2.0**128
"""No count, size, time or loss is as large (it is where fp32 ends), and sums of squares stay finite below."""

_PART_BYTES = 2**20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Also marks that turn the direction of writing."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def open_file(path: Path, what: str) -> Iterator[BinaryIO]:
    """`path` to be read as bytes. `what` names it for the user, such as 'machine profile'.

    Raises `UserError` if it is missing, may not be read, or is no regular file; and for an `OSError` while it
    is open.
    """
    try:
        # O_NONBLOCK: a FIFO without a writer would be waited for here.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            mode = os.fstat(descriptor).st_mode
            kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
            if kind is not None:
                raise UserError(str(path), f"is {kind}, not a {what}", "name the file")
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise UserError(str(path), f"there is no such {what}", "check the path") from None
    except PermissionError:
        raise UserError(str(path), f"this {what} may not be read", "change its permissions") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror or error})", "check the path") from None
    except ValueError as error:
        if "null" not in str(error):  # of a name with a null character; else a defect of what reads
            raise
        raise UserError(str(path), "cannot be read (no name of a file)", "check the path") from None


def read_bytes(path: Path, what: str, most_bytes: int = MOST_BYTES) -> bytes:
    """All of `path`. Raises `UserError` as `open_file` does, and if it has more than `most_bytes`."""
    content = bytearray()
    with open_file(path, what) as file:
        # In parts: Python takes the memory for all that it is asked to read, however small the file is.
        while len(content) <= most_bytes and (part := file.read(_PART_BYTES)):
            content += part
    if len(content) > most_bytes:
        raise UserError(str(path), f"has more than the {most_bytes} bytes of any {what}", "check the path")
    return bytes(content)


_UTF8 = "utf-8-sig"
"""With or without the mark that some editors put first."""


def read_text(path: Path, what: str, most_bytes: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """All of `path`, with line breaks as they are. Raises `UserError` as `read_bytes` does, and if it is not
    text in `encoding`."""
    content = read_bytes(path, what, most_bytes)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            str(path), f"is not UTF-8 text (byte {error.start})", f"restore this {what}"
        ) from None


def read_json(path: Path, what: str, most_bytes: int = MOST_BYTES) -> Any:
    """The JSON document at `path`. Raises `UserError` as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, what, most_bytes), str(path), what)


def read_toml(path: Path, what: str, most_bytes: int = MOST_SETTINGS_BYTES) -> dict[str, Any]:
    """The TOML document at `path`. Raises `UserError` as `read_bytes` and `parse_toml` do."""
    return parse_toml(read_bytes(path, what, most_bytes), str(path))


def parse_json(content: str | bytes, name: str, what: str) -> Any:
    """The value that `content` is in JSON. Raises `UserError`, which calls it `name`, if it is none or is
    refused by `why_not_plain`."""
    try:
        text = content if isinstance(content, str) else content.decode(_UTF8)
        value = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(name, f"is not valid JSON ({error})", f"restore or delete this {what}") from None
    why = why_not_plain(value, check_text=_SURROGATE.search(text) is not None)
    if why is not None:
        raise UserError(name, f"is not valid JSON ({why})", f"restore or delete this {what}")
    return value


def parse_toml(content: str | bytes, name: str) -> dict[str, Any]:
    """The table that `content` is in TOML. Raises `UserError` as `parse_json` does."""
    try:
        value = tomllib.loads(content if isinstance(content, str) else content.decode(_UTF8))
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(name, f"is not valid TOML ({error})", "fix the file") from None
    why = why_not_plain(value)
    if why is not None:
        raise UserError(name, f"is not valid TOML ({why})", "fix the file")
    return value


def why_not_plain(value: Any, *, check_text: bool = True) -> str | None:
    """Why a parsed document is refused, whatever its fields mean; `None` if it is not.

    No document of ours has lists and tables more than `MOST_DEPTH` deep, a finite number above `MOST_NUMBER`,
    or text with half a character (a lone surrogate).
    """
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if check_text:
                    below += each.keys()
            elif isinstance(each, list):
                below += each
            elif isinstance(each, float | int):
                if not -MOST_NUMBER <= each <= MOST_NUMBER and _is_finite(each):
                    return f"a number is above {MOST_NUMBER:.0e}"
            elif check_text and isinstance(each, str) and not _is_whole_text(each):
                return "a text has half a character"
        if not below:
            return None
        level = below
    return f"is more than {MOST_DEPTH} levels deep"


def _is_finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)


def _is_whole_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_controls(value: Any) -> Any:
    """A parsed document whose texts hold no control characters but tabs and line breaks: they are printed,
    and an escape sequence in the name of a machine would reach the terminal."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_controls(each) for each in value]
    if isinstance(value, dict):
        return {without_controls(key): without_controls(each) for key, each in value.items()}
    return value


def exists(path: Path) -> bool:
    """Whether there is something at `path`. Raises `UserError` if that cannot be told: a folder above it may
    not be looked into, or the name is none."""
    return _mode(path) is not None


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises `UserError` as `exists` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file. Raises `UserError` as `exists` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def names_in(folder: Path) -> set[str]:
    """What lies in `folder`. Raises `UserError` if that cannot be read."""
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            str(folder), f"cannot be read ({reason})", "check the path and its permissions"
        ) from None


def expanded(name: str) -> Path:
    """`name` as a path, `~` being a home. Raises `UserError` for the home of a user that there is not."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(name, "there is no such user's home", "write the path out") from None


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            str(path), f"cannot be looked at ({reason})", "check the path, and its permissions"
        ) from None
