"""What the columns of a table or the keys of records mean: layouts of the field, or what the user says.

Nothing is guessed: a column that no layout knows is an error that lists the columns. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engines.errors import UserError
from harness.data.reading.files import Records, listed, shortened
from harness.records.job import DataKind

Names = tuple[str, ...]

_TEXT: Names = (
    "text",
    "sentence",
    "review",
    "comment",
    "tweet",
    "document",
    "content",
    "utterance",
    "headline",
)
_LABEL: Names = (
    "label", "labels", "sentiment", "class", "category", "stars", "rating", "score", "polarity", "target",
    "quality", "is_duplicate", "gold_label", "intent", "emotion", "topic", "relatedness_score",
)  # fmt: skip
_PAIRS: tuple[tuple[str, str], ...] = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("#1 string", "#2 string"), ("question", "sentence"),
)  # fmt: skip
_PASSED_OVER: Names = (
    "id", "idx", "index", "guid", "uid", "uuid", "pairid", "pair_id", "qid1", "qid2", "qid", "#1 id", "#2 id",
    "__index_level_0__", "source", "dataset", "lang", "language", "url", "timestamp", "created_at", "split",
)  # fmt: skip
"""Columns that no layout means: numbers of rows, where they come from. The line about the file names them."""
_UNNAMED: Names = ("", "unnamed: 0")
"""How pandas calls the column of its index: with no name, and once it has been read and written again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which columns make an example of a kind."""

    kind: DataKind
    needs: Mapping[str, Names]
    """Role -> names by which it goes, the first of them the usual one."""
    may_have: Mapping[str, Names] = field(default_factory=dict)
    passes_over: Names = ()
    """Names that mean nothing here, beside those that mean nothing anywhere."""


def _labelled(pair: tuple[str, str] | None, role: str) -> Layout:
    texts = {"text": _TEXT} if pair is None else {"text": (pair[0],), "text2": (pair[1],)}
    return Layout(kind="labelled", needs={**texts, role: _LABEL})


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        kind="chats",
        needs={"messages": ("messages", "conversations", "conversation", "dialogue")},
        may_have={"system": ("system", "system_prompt")},
        passes_over=("category", "model", "score", "prompt_id"),
    ),
    Layout(
        kind="instructions",
        needs={"instruction": ("instruction",), "output": ("output", "response")},
        may_have={"input": ("input", "context"), "system": ("system",), "history": ("history",)},
        passes_over=("category", "text"),  # Dolly's kind of task; Alpaca's at the hub, all of it once more
    ),
    Layout(
        kind="instructions",
        needs={"prompt": ("prompt",), "completion": ("completion", "response")},
        may_have={"system": ("system",)},
        passes_over=("category",),
    ),
    Layout(kind="instructions", needs={"instruction": ("question",), "output": ("answer",)}),
    Layout(
        kind="questions",
        needs={"question": ("question",), "context": ("context",)},
        may_have={name: (name,) for name in ("answers", "answer_start", "answer_end")},
        passes_over=("title", "is_impossible"),
    ),
    *(_labelled(pair, "label") for pair in _PAIRS),
    _labelled(None, "label"),
    Layout(kind="text", needs={"text": _TEXT}, passes_over=("meta", "metadata")),
)  # fmt: skip

_SAID_ONLY: tuple[Layout, ...] = (
    _labelled(("text", "text2"), "label"),
    _labelled(("text", "text2"), "target"),
    _labelled(None, "target"),
)
"""What only a user can say: names do not tell a number that is to be predicted from a class."""

ROLES: Names = tuple(
    dict.fromkeys(role for layout in (*LAYOUTS, *_SAID_ONLY) for role in (*layout.needs, *layout.may_have))
)

KNOWN_HELP = (
    'use "text" and "label", "instruction" and "output", "prompt" and "completion", "messages", or say with'
    " --columns"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What the columns of a file were taken for."""

    kind: DataKind
    column_of: Mapping[str, str]
    """Role -> column."""
    needed: Names
    """The roles without which there is no example."""
    passed_over: Names
    was_said: bool
    """By the user, not by the names."""
    named: Names = ()
    """Columns that a template or its label words name, roles of their own."""

    def __str__(self) -> str:
        taken = ", ".join(
            role if role == column else f"{role} = {column}" for role, column in self.column_of.items()
        )
        return taken + self.passed_over_too

    @property
    def passed_over_too(self) -> str:
        names = [name or "the row numbers" for name in self.passed_over]
        return f"; passed over: {listed(names)}" if names else ""


def is_header(cells: Sequence[str], said: Mapping[str, str]) -> bool:
    """Whether a first row names columns: it has those that were said, or known ones and no number."""
    names = [cell.strip() for cell in cells]
    if said and all(column in names for column in said.values()):
        return True
    lower = [name.casefold() for name in names]
    if any(_is_number(name) for name in names):
        return False
    if len(lower) == 1:
        return lower[0] in _TEXT
    known = _known_names()
    labelled = any(name in _LABEL for name in lower) and sum(name in known for name in lower) > 1
    return labelled or all(name in known or name in _PASSED_OVER + _UNNAMED for name in lower)


def _known_names() -> frozenset[str]:
    return frozenset(
        name
        for layout in LAYOUTS
        for names in (*layout.needs.values(), *layout.may_have.values())
        for name in names
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def meaning_of(name: str, records: Records, said: Mapping[str, str], named: Names = ()) -> Meaning:
    """What the columns of `records` are, by their names or as `said` (role -> column); `named` are those that
    a template names.

    Raises `UserError` for columns that are not understood, for what `said` or a template names and there is
    not, and for data that no method here learns from.
    """
    meaning = _by_roles(name, records, said, named)
    if meaning.kind != "labelled" or not named:
        return meaning
    answers = {meaning.column_of.get(role) for role in ("label", "target")}
    for column in named:
        flag = f"{{{shortened(column)}}} of a template or a label"
        if column not in records.columns:
            role_of = {column: role for role, column in meaning.column_of.items() if role != column}
            names = [f"{each} ({role_of[each]})" if each in role_of else each for each in records.columns]
            raise UserError(flag, f"is no column of {name}, which has {listed(names)}", "name one of them")
        if column in answers:
            raise UserError(flag, "would tell the model the answer", "leave it out")
    roles = [role for role in meaning.column_of if role not in ("label", "target")]
    texts = {role: meaning.column_of[role] for role in roles} | {column: column for column in named}
    return replace(
        meaning,
        column_of={**texts, **meaning.column_of},  # the label last, what its classes are follows it
        passed_over=tuple(column for column in meaning.passed_over if column not in named),
        named=named,
    )


def _by_roles(name: str, records: Records, said: Mapping[str, str], named: Names) -> Meaning:
    if said:
        return _as_said(name, records, said)
    if not records.has_names:
        return _without_names(name, records)
    usual = _usual(records)
    _refuse_by_name(name, usual)
    lower = {column.casefold(): column for column in records.columns}
    nearest: tuple[str, ...] | None = None
    for layout in LAYOUTS:
        found = {
            role: next((lower[alias] for alias in aliases if alias in lower), None)
            for role, aliases in {**layout.needs, **layout.may_have}.items()
        }
        if any(found[role] is None for role in layout.needs):
            continue
        column_of = {role: column for role, column in found.items() if column is not None}
        taken = {*column_of.values(), *named}
        others = [column for column in records.columns if column not in taken]
        strange = tuple(
            column
            for column in others
            if column.casefold() not in _PASSED_OVER + layout.passes_over
            and not (column.casefold() in _UNNAMED and _numbers_rows(records, column))
        )
        unknown = tuple(column for column in strange if column in usual)
        if not unknown:
            return Meaning(
                kind=layout.kind, column_of=column_of, needed=tuple(layout.needs),
                passed_over=tuple(column for column in others if column not in strange), was_said=False,
            )  # fmt: skip
        if nearest is None or len(unknown) < len(nearest):
            nearest = unknown
    if nearest is None:
        raise UserError(f"data '{name}'", f"has {listed(records.columns)}, which make no example", KNOWN_HELP)
    raise UserError(
        f"data '{name}'",
        f"has {listed(records.columns)}: what {listed(nearest, 3)} means is not known",
        "say what to use, such as --columns text=NAME,label=NAME",
    )


def _usual(records: Records) -> list[str]:
    """Columns that at least a tenth of the records have something in."""
    counts: Counter[str] = Counter()
    for record in records.records:
        counts.update(column for column, value in record.values.items() if value is not None)
    return [column for column in records.columns if 10 * counts[column] >= len(records.records)]


def _refuse_by_name(name: str, columns: Iterable[str]) -> None:
    """Data of the field that is not for the losses that there are."""
    lower = {column.casefold() for column in columns}
    if {"chosen", "rejected"} <= lower:
        raise UserError(
            f"data '{name}'",
            "holds preferences (chosen, rejected), which no method here learns from",
            "keep the chosen answers, as records with prompt and completion",
        )
    if {"prompt", "completion", "label"} <= lower:
        raise UserError(
            f"data '{name}'",
            "holds answers that are marked good or bad (KTO), which no method here learns from",
            "keep the good ones, as records with prompt and completion",
        )
    if tools := lower & {"tools", "functions", "function_call", "tool_calls"}:
        raise UserError(
            f"data '{name}'",
            f"holds calls of tools ({listed(sorted(tools))}), which are not read",
            "leave the tools out of the records",
        )


def _numbers_rows(records: Records, column: str) -> bool:
    """Whether a column counts the rows, from wherever."""
    try:
        values = [int(str(record.values.get(column, "")).strip()) for record in records.records]
    except ValueError:
        return False
    return len(set(values)) == len(values)


def _without_names(name: str, records: Records) -> Meaning:
    """Of a table without a header: a text and its label, as the first and the second of two columns."""
    if len(records.columns) == 2:
        return Meaning(
            kind="labelled", column_of={"text": "1", "label": "2"}, needed=("text", "label"), passed_over=(),
            was_said=False,
        )  # fmt: skip
    if not records.records or len(records.columns) == 1:
        bad = records.bad[0] if records.bad else None
        where = f"{name}: {bad.place}" if bad else f"data '{name}'"
        why = (
            "has no tab" if records.form.startswith("TSV") else "has one column, and no header that names it"
        )
        raise UserError(where, why, "write text<TAB>label, or name its suffix as what it is")
    shown = (f"{column} '{shortened(str(value), 16)}'" for column, value in records.records[0].values.items())
    raise UserError(
        f"data '{name}'",
        f"has {len(records.columns)} columns without names: {', '.join([*shown][:4])}",
        "say which by number, such as --columns text=1,label=2",
    )


def _as_said(name: str, records: Records, said: Mapping[str, str]) -> Meaning:
    column_of = {}
    for role, wanted in said.items():
        column = wanted
        if wanted not in records.columns and wanted.isdecimal() and 0 < int(wanted) <= len(records.columns):
            column = records.columns[int(wanted) - 1]
        if column not in records.columns:
            first = records.records[0].values.values() if records.records else ()
            has = "the columns" if records.has_names else "no such column in its first line"
            raise UserError(
                f"--columns {role}={shortened(wanted)}",
                f"{name} has {has} {listed(records.columns if records.has_names else first)}",
                "name one of them, or give its number from 1",
            )
        column_of[role] = column
    for layout in (*LAYOUTS, *_SAID_ONLY):
        if layout.needs.keys() <= said.keys() <= layout.needs.keys() | layout.may_have.keys():
            rest = tuple(column for column in records.columns if column not in column_of.values())
            return Meaning(
                kind=layout.kind, column_of=column_of, needed=tuple(layout.needs), passed_over=rest,
                was_said=True,
            )  # fmt: skip
    raise UserError(
        "--columns",
        f"{listed(said)} together make no example",
        "such as text=...,label=... or prompt=...,completion=...",
    )


def parse_columns(text: str) -> dict[str, str]:
    """`text=review,label=stars` as role -> column. Raises `UserError`."""
    found = {}
    for part in text.split(","):
        role, equals, column = part.partition("=")
        if not equals or not column.strip() or role.strip() not in ROLES:
            raise UserError(
                f"--columns {shortened(part)}",
                f"is not ROLE=COLUMN with a role of {', '.join(ROLES)}",
                "such as --columns text=review,label=stars",
            )
        found[role.strip()] = column.strip()
    return found
