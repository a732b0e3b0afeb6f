"""Tables of text (CSV and TSV): which delimiter, whether quotes count, and where rows end.

All of it is decided by the whole file. pandas fills short rows and joins lines at a stray quote without a
word, so rows come from the standard library's csv in its strict form, and every row keeps its line.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.errors import UserError
from harness.data.reading.files import BadRecord, Record, Records

NAME_OF = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}

Row = tuple[int, list[str]]
"""Line at which it begins, from 1, and its cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DelimitedRows:
    """Rows as one way to read a file gives them."""

    delimiter: str
    quoted: bool
    rows: list[Row]
    fault: tuple[int, str] | None = None
    """Line and reason where the quotes are not as they should be; the rows end there."""

    @property
    def width(self) -> int:
        """Cells of most rows."""
        return Counter(len(cells) for _, cells in self.rows).most_common(1)[0][0] if self.rows else 0

    @property
    def ragged(self) -> int:
        """Rows of another width."""
        return sum(len(cells) != self.width for _, cells in self.rows)


def read_delimited(name: str, text: str, suffix: str, is_header: Callable[[Sequence[str]], bool]) -> Records:
    """The rows of a table. `name` is the file's in messages, `is_header` says whether a row names columns.

    Raises `UserError` for quotes that do not close and for a table without a row.
    """
    found = _best_csv(text, is_header) if suffix == ".csv" else _best_tsv(text)
    if found.fault is not None:
        line, why = found.fault
        raise UserError(f"{name}: line {line}", why, "write quotes inside of quotes twice, and close each")
    if not found.rows:
        raise UserError(f"data '{name}'", "holds no row", "give a file with examples")
    first = found.rows[0][1]
    names = is_header(first)
    width = len(first) if names else found.width
    columns = _distinct(first) if names else tuple(str(number) for number in range(1, width + 1))
    records, bad = [], []
    for line, cells in found.rows[1:] if names else found.rows:
        if len(cells) == width:
            values = dict(zip(columns, cells, strict=True))
            records.append(Record(position=line, place=f"line {line}", values=values))
        elif len(cells) == 1 and found.delimiter == "\t":
            bad.append(BadRecord(position=line, place=f"line {line}", why="has no tab"))
        else:
            like = f"the header {width}" if names else f"most rows {width}"
            bad.append(BadRecord(position=line, place=f"line {line}", why=f"has {len(cells)} cells, {like}"))
    if not records and not bad:
        raise UserError(f"data '{name}'", "holds a header and nothing else", "give a file with examples")
    form = NAME_OF[found.delimiter] + (", quoted" if found.quoted and found.delimiter == "\t" else "")
    return Records(
        form=f"{form}, with a header" if names else f"{form}, without a header",
        columns=columns, has_names=names, records=tuple(records), bad=tuple(bad),
    )  # fmt: skip


def is_table(text: str) -> bool:
    """Whether every line of a plain text has the same number of tabs, at least one of them."""
    tabs = {line.count("\t") for line in text.split("\n") if line.strip()}
    return len(tabs) == 1 and tabs != {0}


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of columns, stripped; one that is there twice gets its place."""
    stripped = [name.strip() for name in names]
    counts = Counter(stripped)
    return tuple(
        name if counts[name] == 1 else f"{name}.{place}" for place, name in enumerate(stripped, start=1)
    )


def _best_csv(text: str, is_header: Callable[[Sequence[str]], bool]) -> DelimitedRows:
    """As most rows are alike with a delimiter; a first row that names columns goes before that."""
    readings = [_quoted_rows(text, delimiter) for delimiter in (",", ";", "\t", "|")]
    comma = readings[0]

    def alike(reading: DelimitedRows) -> tuple[bool, float]:
        if reading.fault is not None or reading.width < 2:
            return False, 0.0
        share = sum(len(cells) == reading.width for _, cells in reading.rows) / len(reading.rows)
        return is_header(reading.rows[0][1]), share

    best = max(readings, key=alike)  # the first of equals
    return best if alike(best)[1] > 0.5 else comma


def _best_tsv(text: str) -> DelimitedRows:
    """Quotes count in a TSV only where they can be nothing else.

    GLUE's files have quotes that mean nothing. A program that quotes cells quotes every cell that holds a
    quote, a tab or a line's end, so then no other cell holds one, and every quoted cell closes.
    """
    plain = _plain_rows(text, "\t")
    if not _OPENS.search(text):
        return plain
    quoted = _quoted_rows(text, "\t")
    if quoted.fault is not None:
        return quoted if _is_meant_to_be_quoted(plain) else plain
    if any('"' in between for between in _QUOTED.split(text)[::2]):
        return plain
    if len(quoted.rows) != len(plain.rows) and plain.ragged <= quoted.ragged and _labels_agree(plain, quoted):
        return plain  # a quote opens in one line, and another happens to close in a later one
    cells = _QUOTED.findall(text)
    needed = any(_NEEDS_QUOTES.search(cell) for cell in cells)
    return quoted if needed or 2 * len(cells) >= len(quoted.rows) else plain


_OPENS = re.compile(r'(?:^|\t)"', re.MULTILINE)
_QUOTED = re.compile(r'(?:^|(?<=\t))"([^"]*(?:""[^"]*)*)"(?=\t|\r?$)', re.MULTILINE)
_NEEDS_QUOTES = re.compile(r'["\t\r\n]')


def _is_meant_to_be_quoted(plain: DelimitedRows) -> bool:
    """Whether a file whose quotes do not all close is one that quotes all the same: then it has a mistake in
    it, which has to be told."""
    with_quotes = [cell.rstrip("\r") for _, row in plain.rows for cell in row if '"' in cell]
    closed = [cell for cell in with_quotes if _QUOTED.fullmatch(cell)]
    doubled = any('""' in cell[1:-1] for cell in closed)
    return 2 * len(closed) > len(with_quotes) and (doubled or 2 * len(closed) >= len(plain.rows))


def _labels_agree(plain: DelimitedRows, quoted: DelimitedRows) -> bool:
    """Whether a column of few values has the same ones in both readings."""
    if plain.width != quoted.width:
        return False
    for place in range(plain.width):
        values, others = (
            {cells[place].strip() for _, cells in reading.rows[1:] if place < len(cells)}
            for reading in (quoted, plain)
        )
        if 2 * len(values) <= len(quoted.rows) and values >= others:
            return True
    return False


def _plain_rows(text: str, delimiter: str) -> DelimitedRows:
    """Every line a row, quotes are characters like others."""
    rows = [
        (number, line.removesuffix("\r").split(delimiter))
        for number, line in enumerate(_lines(text), start=1)
        if line.strip()
    ]
    return DelimitedRows(delimiter=delimiter, quoted=False, rows=rows)


def _lines(text: str) -> list[str]:
    return (text if "\n" in text else text.replace("\r", "\n")).split("\n")


def _quoted_rows(text: str, delimiter: str) -> DelimitedRows:
    """As RFC 4180 has it. A carriage return ends a row only with a line feed, and only if it does so in the
    first line: pandas writes one that stands in a cell without quotes."""
    csv.field_size_limit(sys.maxsize)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    stand_in = ""
    if "\r" in text and not text.partition("\n")[0].endswith("\r"):
        stand_in = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        text = text.replace("\r", stand_in)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    fault = None
    begin = 1
    try:
        for cells in reader:
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                rows.append((begin, [cell.replace(stand_in, "\r") for cell in cells] if stand_in else cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        why = (
            "a quote is never closed"
            if "end of data" in str(error)
            else "a quoted cell goes on after its quote"
        )
        if "new-line" in str(error):
            why = "a carriage return stands in a cell without quotes"
        fault = begin, why
    return DelimitedRows(delimiter=delimiter, quoted=True, rows=rows, fault=fault)
