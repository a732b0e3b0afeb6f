"""What every reader begins and ends with: a file's text, and its records with the places where they stand."""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a table or one JSON object."""

    position: int
    """Its line or its number, for the order."""
    place: str
    """Where it stands, such as `line 7`."""
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """A record that cannot be used."""

    position: int
    place: str
    why: str


class UnusableError(Exception):
    """Why a record cannot be used; what reads it catches this and goes on with the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """What a file holds, before anybody says what it means."""

    form: str
    """Such as `CSV with a header`."""
    columns: tuple[str, ...]
    """All names, in their order; numbers from 1 in a table without a header."""
    has_names: bool
    records: tuple[Record, ...]
    bad: tuple[BadRecord, ...] = ()
    """Rows that are not like the others."""
    replaced_characters: int = 0
    class_names: Mapping[str, tuple[str, ...]] | None = None
    """Of columns that hold numbers for names, as a data set says; `None`: it does not."""


def read_data_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 where a mark at its start says so; the mark is left out.

    Raises `UserError` for a file that is missing, empty, or in another encoding.
    """
    if not path.exists():
        raise UserError(
            f"data '{path}'", "there is no such file", "check the path, or use 'builtin' or 'random'"
        )
    if path.is_dir():
        raise UserError(f"data '{path}'", "is a folder", "name one file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data '{path}'", f"cannot be read ({error.strerror})", "check its permissions"
        ) from None
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"{encoding.removesuffix('-sig').upper()} (byte {error.start:,})"
        remedy = f"convert it to UTF-8, such as with: iconv -f {_likely(content)} -t UTF-8 FILE > NEW"
        raise UserError(f"data '{path}'", f"is not {where}", remedy) from None
    if not text.strip():
        raise UserError(f"data '{path}'", "is empty", "give a file with examples")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"data '{path}'", f"holds a zero byte in line {line:,}", "give it as plain UTF-8 text"
        )
    return text


def _likely(content: bytes) -> str:
    """The name that iconv has for what the bytes may be in: Japanese encodings where they are well-formed in
    one and say something in kana there, else the one in which every byte is a letter."""
    for encoding in ("EUC-JP", "CP932"):
        with contextlib.suppress(UnicodeDecodeError):
            if any("ぁ" <= letter <= "ヺ" for letter in content.decode(encoding)):
                return encoding
    return "LATIN1"


def shortened(text: str, most: int = 24) -> str:
    """On one line, with an end that says so where it is longer than `most`."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def listed(names: Iterable[object], most: int = 6) -> str:
    """Names for a message, so many of them at most."""
    each = [shortened(str(name), 20) or "''" for name in names]
    more = f" and {len(each) - most} more" if len(each) > most else ""
    return ", ".join(each[:most]) + more
