"""Files of examples: found, read and checked, before any tokenizer is near. Imports no torch.

Four kinds come out: plain text, labelled sentences, instruction records, and questions about texts. Every
fault in a file is a `UserError` that names the line or the record.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engines.errors import UserError
from engines.files.reading import parse_json
from harness.data.builtin import builtin_reviews
from harness.data.records import (
    RECORD_KEYS,
    Examples,
    InstructionExample,
    LabelledExample,
    listed,
)
from harness.data.squad import question_example
from harness.records.job import DataSource

T = TypeVar("T")

SUFFIXES = (".txt", ".tsv", ".jsonl", ".json")

HELD_OUT_SHARE = 10
"""One in so many examples is held out where no evaluation set is given."""
MOST_HELD_OUT = 1000


def read_examples(source: DataSource) -> Examples:
    """The examples of a job, training and held out; the same split for every seed.

    Raises `UserError` for a path that is missing, empty, of an unknown kind or malformed.
    """
    if source.train in ("random", "builtin"):
        if source.evaluate is not None:
            raise UserError(
                f"evaluation set {source.evaluate}",
                f"the training data is '{source.train}', which has its own held-out part",
                "leave it out, or train on a file",
            )
        if source.train == "random":
            return Examples(kind="random")
        train, held_out = builtin_reviews()
        return Examples(kind="builtin", labelled=train, labelled_held_out=held_out)
    read = _read_file(Path(source.train))
    if source.evaluate is None:
        return _check_labels(_split(read), source)
    other = _read_file(Path(source.evaluate))
    if other.kind != read.kind:
        raise UserError(
            source.evaluate,
            f"holds {other.kind} data, the training set holds {read.kind} data",
            "give sets of the same kind",
        )
    together = Examples(
        kind=read.kind,
        labelled=read.labelled,
        labelled_held_out=other.labelled,
        instructions=read.instructions,
        instructions_held_out=other.instructions,
        questions=read.questions,
        questions_held_out=other.questions,
        text=read.text,
        text_held_out=other.text if other.kind == "text" else None,
    )
    return _check_labels(together, source)


def held_out_count(num_examples: int) -> int:
    """How many of `num_examples` are held out: a tenth, at least one of two, at most a thousand."""
    if num_examples < 2:
        return 0
    return min(max(1, num_examples // HELD_OUT_SHARE), MOST_HELD_OUT)


def _split(read: Examples) -> Examples:
    """Hold out a part that is drawn once and for all, whatever the job's seed."""

    def divide(rows: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
        count = held_out_count(len(rows))
        held_out = set(random.Random(0).sample(range(len(rows)), count))
        return (
            tuple(row for index, row in enumerate(rows) if index not in held_out),
            tuple(row for index, row in enumerate(rows) if index in held_out),
        )

    labelled, labelled_held_out = divide(read.labelled)
    instructions, instructions_held_out = divide(read.instructions)
    questions, questions_held_out = divide(read.questions)
    return Examples(
        kind=read.kind,
        labelled=labelled,
        labelled_held_out=labelled_held_out,
        instructions=instructions,
        instructions_held_out=instructions_held_out,
        questions=questions,
        questions_held_out=questions_held_out,
        text=read.text,
    )


def _read_file(path: Path) -> Examples:
    suffix = path.suffix.lower()
    if not path.exists():
        raise UserError(
            f"data '{path}'", "there is no such file", "check the path, or use 'builtin' or 'random'"
        )
    if path.is_dir():
        raise UserError(f"data '{path}'", "is a folder", "name one file in it")
    if suffix not in SUFFIXES:
        raise UserError(
            f"data '{path}'", f"the suffix '{suffix}' is not known", f"use one of {', '.join(SUFFIXES)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data '{path}'", f"is not UTF-8 (byte {error.start})", "convert it to UTF-8"
        ) from None
    except OSError as error:
        raise UserError(
            f"data '{path}'", f"cannot be read ({error.strerror})", "check its permissions"
        ) from None
    if not text.strip():
        raise UserError(f"data '{path}'", "is empty", "give a file with examples")
    if suffix == ".txt":
        return Examples(kind="text", text=text)
    if suffix == ".tsv":
        return Examples(kind="labelled", labelled=tuple(_labelled_lines(path, text)))
    return _examples_of_records(path, list(_records(path, text)))


def _labelled_lines(path: Path, text: str) -> Iterator[LabelledExample]:
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        sentence, tab, label = line.rpartition("\t")
        if not found and tab and label.strip().lower() == "label":
            continue  # the header of GLUE files
        if not tab:
            raise UserError(f"{path}: line {number}", "has no tab", "write text<TAB>label")
        yield _labelled_example(path, f"line {number}", sentence, label.strip())
        found = True
    if not found:
        raise UserError(f"data '{path}'", "holds a header and nothing else", "give a file with examples")


def _labelled_example(path: Path, place: str, text: object, label: object) -> LabelledExample:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}: {place}", "its text is missing or empty", "give every example a text")
    try:
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise ValueError
        value = int(label)
    except ValueError:
        raise UserError(
            f"{path}: {place}", f"label '{label}' is not an integer", "number the classes from 0"
        ) from None
    if value < 0:
        raise UserError(f"{path}: {place}", f"label {value} is negative", "number the classes from 0")
    return LabelledExample(text=text.strip(), label=value, place=place)


def _records(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) for each record of a JSON list or of a JSON-lines file."""
    if path.suffix.lower() == ".json":
        values = _parse(path, "the file", text)
        if not isinstance(values, list):
            raise UserError(
                f"data '{path}'", "is not a JSON list of records", f"give a list of records {RECORD_KEYS}"
            )
        placed = [(f"record {number}", value) for number, value in enumerate(values, start=1)]
    else:
        placed = [
            (f"line {number}", _parse(path, f"line {number}", line))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for place, value in placed:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {place}", "is not a JSON object", f"give records {RECORD_KEYS}")
        yield place, value


def _parse(path: Path, place: str, text: str) -> Any:
    return parse_json(text, f"{path}: {place}", "record")


def _examples_of_records(path: Path, records: Sequence[tuple[str, Mapping[str, Any]]]) -> Examples:
    if not records:
        raise UserError(f"data '{path}'", "holds no record", f"give records {RECORD_KEYS}")
    if "instruction" in records[0][1]:
        return Examples(
            kind="instructions",
            instructions=tuple(_instruction(path, place, record) for place, record in records),
        )
    if "question" in records[0][1]:
        return Examples(
            kind="questions",
            questions=tuple(question_example(f"{path}: {place}", record) for place, record in records),
        )
    labelled = []
    for place, record in records:
        text_key = "text" if "text" in record else "sentence"
        if text_key not in record or "label" not in record:
            raise UserError(
                f"{path}: {place}",
                f"has the keys {listed(record)}, which make no example",
                f"give records {RECORD_KEYS}",
            )
        labelled.append(_labelled_example(path, place, record[text_key], record["label"]))
    return Examples(kind="labelled", labelled=tuple(labelled))


def _instruction(path: Path, place: str, record: Mapping[str, Any]) -> InstructionExample:
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise UserError(
                f"{path}: {place}",
                f'"{key}" is missing or empty (keys: {listed(record)})',
                f"give records {RECORD_KEYS}",
            )
    return InstructionExample(
        prompt=instruction_prompt(record["instruction"], str(record.get("input") or "")),
        answer=record["output"].strip(),
    )


def instruction_prompt(instruction: str, given: str) -> str:
    """The prompt of an Alpaca-like record: what to do, the task, its input if any, the answer's heading."""
    opening = "Do the task below" + (", using the input that follows it." if given.strip() else ".")
    middle = f"\n\n### Input:\n{given.strip()}" if given.strip() else ""
    return f"{opening}\n\n### Instruction:\n{instruction.strip()}{middle}\n\n### Response:\n"


def _check_labels(examples: Examples, source: DataSource) -> Examples:
    """Classes of the training set are 0 to n - 1 with n > 1; the held-out set has no others."""
    if examples.kind != "labelled":
        return examples
    # A split may have held out the only example of a class: count both parts.
    first: dict[int, LabelledExample] = {}
    own = examples.labelled + (examples.labelled_held_out if source.evaluate is None else ())
    for example in own:
        first.setdefault(example.label, example)
    for expected, label in enumerate(sorted(first)):
        if label != expected:
            raise UserError(
                f"{source.train}: {first[label].place}",
                f"label {label} is used, label {expected} never is",
                "number the classes from 0 without gaps",
            )
    if len(first) < 2:
        raise UserError(f"data '{source.train}'", "every label is 0", "give examples of at least two classes")
    if source.evaluate is not None:
        for example in examples.labelled_held_out:
            if example.label not in first:
                raise UserError(
                    f"{source.evaluate}: {example.place}",
                    f"label {example.label} is not among the training set's labels 0 to {len(first) - 1}",
                    "use the training set's classes",
                )
    return examples
