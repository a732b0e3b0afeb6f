"""One file or data set, whatever its form, as examples of one kind. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from engines.errors import UserError
from harness.data.fields import columns_named
from harness.data.reading import columns
from harness.data.reading.chats import chat_example
from harness.data.reading.delimited import is_table, read_delimited
from harness.data.reading.extras import JSON_SUFFIXES, SUFFIXES, is_hub_id, read_hub, read_parquet
from harness.data.reading.files import BadRecord, Record, Records, UnusableError, listed, read_data_text
from harness.data.reading.json_files import json_records
from harness.data.reading.labels import FEW, Classes, Label, number_classes, read_label
from harness.data.reading.layouts import instruction_example, text_of
from harness.data.reading.squad import question_example
from harness.data.records import Examples, LabelledExample, LeftOut, Reading
from harness.records.job import DataSource

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileExamples:
    """The examples of a file, of one kind."""

    examples: Examples
    """All in the fields of the training part."""
    classes: Classes | None
    """How its labels are numbered; `None` without labels."""


def read_file(
    source: str, said: DataSource, label_ids: Mapping[str, int], earlier: Classes | None = None
) -> FileExamples:
    """The examples in the file or the data set `source`, read as `said` says.

    `label_ids` are the model's own names of classes; `earlier` are the classes of the training set where this
    is a held-out one. Raises `UserError` for what cannot be read or is not understood, for a record that
    cannot be used where `said` is strict, and for more than a tenth of them where it does not say otherwise.
    """
    name = source if is_hub_id(source) else Path(source).name
    records = _records_of(source, said)
    if isinstance(records, str):
        reading = Reading(name=name, form="plain text", meaning="", records=0)
        return FileExamples(examples=Examples(kind="text", text=records, readings=(reading,)), classes=None)
    if not records.records and not records.bad:
        raise UserError(f"data '{source}'", "holds no record", columns.KNOWN_HELP)
    total = len(records.records) + len(records.bad)
    check_bad(source, records.bad, total, said)
    meaning = columns.meaning_of(source, records, said.columns, columns_named(said))
    bad = list(records.bad)
    usable = _usable_keys(records, meaning, bad)

    def checked() -> None:
        check_bad(source, bad, total, said)

    made, classes = _examples(source, usable, meaning, records, label_ids, earlier, bad, checked)
    checked()
    in_words = str(meaning)
    if classes is not None:  # right behind the label
        numbered = "a number to be predicted" if classes.is_regression else classes.listed()
        before = in_words.removesuffix(meaning.passed_over_too)
        in_words = f"{before} ({numbered}){meaning.passed_over_too}"
    reading = Reading(
        name=name, form=records.form, meaning=in_words, records=total, left_out=left_out_of(bad),
        replaced_characters=records.replaced_characters,
    )  # fmt: skip
    return FileExamples(examples=replace(made, readings=(reading,)), classes=classes)


def _records_of(source: str, said: DataSource) -> Records | str:
    """Records, or the whole of a plain text."""
    if is_hub_id(source):
        return read_hub(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and path.is_file():
        known = ", ".join(SUFFIXES)
        raise UserError(f"data '{source}'", f"the suffix '{suffix}' is not known", f"use one of {known}")
    if suffix == ".parquet":
        return read_parquet(path)
    text = read_data_text(path)
    if suffix in JSON_SUFFIXES:
        return json_records(source, text, lines=JSON_SUFFIXES[suffix])

    def is_header(cells: Sequence[str]) -> bool:
        return columns.is_header(cells, said.columns)

    if suffix == ".txt":
        table = is_table(text) and (said.columns or is_header(text.split("\n", 1)[0].split("\t")))
        if not table and not said.columns:
            return text
        suffix = ".tsv"
    return read_delimited(source, text, suffix, is_header)


def _usable_keys(records: Records, meaning: columns.Meaning, bad: list[BadRecord]) -> list[Record]:
    """Records by role; those with a key that the others do not have are not understood."""
    known = {*meaning.column_of.values(), *meaning.passed_over}
    found = []
    for record in records.records:
        if not meaning.was_said:
            strange = [key for key, value in record.values.items() if key not in known and value is not None]
            if strange:
                why = f'the key "{listed(strange, 2)}" is not one that the others have'
                bad.append(BadRecord(position=record.position, place=record.place, why=why))
                continue
        values = {
            role: record.values[column]
            for role, column in meaning.column_of.items()
            if column in record.values
        }
        found.append(replace(record, values=values))
    return found


def _made(
    records: Sequence[Record], make: Callable[[Record], T], bad: list[BadRecord]
) -> tuple[tuple[T, ...], list[Record]]:
    """What `make` makes of each that it can use, and those."""
    made, used = [], []
    for record in records:
        try:
            made.append(make(record))
            used.append(record)
        except UnusableError as error:
            bad.append(BadRecord(position=record.position, place=record.place, why=str(error)))
    return tuple(made), used


def _examples(
    source: str,
    records: Sequence[Record],
    meaning: columns.Meaning,
    file: Records,
    label_ids: Mapping[str, int],
    earlier: Classes | None,
    bad: list[BadRecord],
    check: Callable[[], None],
) -> tuple[Examples, Classes | None]:
    column_of = meaning.column_of
    if meaning.kind == "chats":
        chats, _ = _made(records, lambda each: chat_example(each.values, each.place), bad)
        return Examples(kind="chats", chats=chats), None
    if meaning.kind == "instructions":
        tasks, _ = _made(records, lambda each: instruction_example(each.values, column_of, each.place), bad)
        return Examples(kind="instructions", instructions=tasks), None
    if meaning.kind == "questions":
        questions, _ = _made(records, lambda each: question_example(each.values, each.place), bad)
        return Examples(kind="questions", questions=questions), None
    if meaning.kind == "text":
        documents, _ = _made(records, lambda each: text_of(each.values, "text", "its text"), bad)
        return Examples(kind="text", documents=documents), None
    return _labelled(source, records, meaning, file, label_ids, earlier, bad, check)


def _labelled(
    source: str,
    records: Sequence[Record],
    meaning: columns.Meaning,
    file: Records,
    label_ids: Mapping[str, int],
    earlier: Classes | None,
    bad: list[BadRecord],
    check: Callable[[], None],
) -> tuple[Examples, Classes]:
    role = "target" if "target" in meaning.column_of else "label"
    paired = "text2" in meaning.column_of
    names = (file.class_names or {}).get(meaning.column_of[role])

    def read(record: Record) -> tuple[str, str | None, Label, Mapping[str, str]]:
        text = text_of(record.values, "text", "its text").strip()
        second = text_of(record.values, "text2", "its second text").strip() if paired else None
        label = read_label(record.values.get(role))
        if names and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        fields = {name: text_of(record.values, name, f'"{name}"').strip() for name in meaning.named}
        return text, second, label, fields

    rows, used = _made(records, read, bad)
    check()  # before what is left is judged as a whole
    labels = [label for _, _, label, _ in rows]
    _check_columns(source, rows, used, meaning, file)
    classes = earlier
    if classes is None:
        classes = number_classes(f"data '{source}'", labels, label_ids, is_target=role == "target")
    numbered = classes

    def example(
        pair: tuple[Record, tuple[str, str | None, Label, Mapping[str, str]]],
    ) -> LabelledExample:
        record, (text, second, label, fields) = pair
        number, target = numbered.number(label)
        return LabelledExample(
            text=text, second=second, fields=fields, label=number, target=target, place=record.place
        )

    made = []
    for record, row in zip(used, rows, strict=True):
        try:
            made.append(example((record, row)))
        except UnusableError as error:
            bad.append(BadRecord(position=record.position, place=record.place, why=str(error)))
    return Examples(kind="labelled", labelled=tuple(made), label_names=classes.names), classes


def _check_columns(
    source: str,
    rows: Sequence[tuple[str, str | None, Label, Mapping[str, str]]],
    used: Sequence[Record],
    meaning: columns.Meaning,
    file: Records,
) -> None:
    """Refuse what looks as if columns were taken for one another, or a header for an example."""
    if len(rows) > 1 and all(text.isdecimal() for text, _, _, _ in rows):
        raise UserError(
            f"data '{source}'",
            f"its text, column '{meaning.column_of['text']}', holds numbers alone",
            "say which is which, such as --columns text=NAME,label=NAME",
        )
    if file.has_names or len(rows) < 2:
        return
    first, others = rows[0][2], [label for _, _, label, _ in rows[1:]]
    if not isinstance(first, str) or first in others:
        return
    numbers = not any(isinstance(label, str) for label in others)
    repeated = len(others) > 3 and 2 * len(set(others)) <= len(others)
    if numbers or repeated:
        raise UserError(
            f"{source}: {used[0].place}",
            f"'{first}' is there once, as if the line were a header",
            f"name its columns, such as --columns text={rows[0][0].split()[0][:20]},label={first}",
        )


def left_out_of(bad: Sequence[BadRecord]) -> LeftOut:
    if not bad:
        return LeftOut()
    first = min(bad, key=lambda each: each.position)
    return LeftOut(count=len(bad), first=f"{first.place}: {first.why}")


def check_bad(source: str, bad: Sequence[BadRecord], total: int, said: DataSource) -> None:
    """Raises `UserError` where records that cannot be used are not to be left out, or are too many."""
    if not bad:
        return
    if said.strict:
        first = min(bad, key=lambda each: each.position)
        raise UserError(f"{source}: {first.place}", first.why, "fix it, or leave out --strict")
    if len(bad) >= total or (len(bad) * FEW > total and not said.skip_bad):
        _refuse(source, bad, total, all_of_them=len(bad) >= total)


def _refuse(source: str, bad: Sequence[BadRecord], total: int, *, all_of_them: bool) -> None:
    first = min(bad, key=lambda each: each.position)
    count = "" if total == 1 else f"; {len(bad):,} of {total:,} records cannot be used"
    remedy = "fix it" if total == 1 else "fix them"
    more = "" if all_of_them else ", or add --skip-bad to leave them out"
    raise UserError(f"{source}: {first.place}", first.why + count, remedy + more)
