"""Names in braces, in a template and in label words: which text of a row belongs there. Imports no torch."""

from __future__ import annotations

from string import Formatter

from engines.errors import UserError
from harness.records.job import DataSource

TEXTS = ("text", "text2", "mask")
"""Names that have a meaning of their own; others are those of columns."""


def names_in_braces(form: str, flag: str) -> tuple[str, ...]:
    """Each once, in their order. Raises `UserError` for braces that enclose no name."""
    try:
        found = [name for _, name, _, _ in Formatter().parse(form) if name is not None]
    except ValueError as error:
        raise UserError(flag, f"{error}", "write {{ for a brace") from None
    for name in found:
        if not name or name.isdecimal() or any(each in name for each in ".[]"):
            raise UserError(flag, f"{{{name}}} is no name of a column", "write {{ for a brace")
    return tuple(dict.fromkeys(found))


def columns_named(source: DataSource) -> tuple[str, ...]:
    """The columns that its template and its label words name, beside a row's text and its second text."""
    if not source.template:
        return ()
    named = list(names_in_braces(source.template, "--template"))
    for word in source.labels:
        named += names_in_braces(word, "--labels")
    return tuple(dict.fromkeys(name for name in named if name not in TEXTS))
