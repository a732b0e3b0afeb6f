"""JSON: a list of records, one record a line, or SQuAD or MultiRC as published. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engines.errors import UserError
from harness.data.reading.files import LONE_SURROGATE, BadRecord, Record, Records, shortened

LAYOUTS = "see 'lspzo-bench data --help' for the layouts"


def json_records(name: str, text: str, *, lines: bool) -> Records:
    """The records of a file; with `lines` one a line. Either form is read under the other's name.

    Raises `UserError` for what is no JSON, and for JSON that holds no list of records.
    """
    start = text.lstrip()[:1]
    if lines and start != "[":
        return _from_lines(text)
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and start == "{":
            return _from_lines(text)
        raise UserError(name, f"is not valid JSON ({error})", "fix it") from None
    except ValueError as error:  # a number of thousands of digits, a key twice
        raise UserError(name, f"is not valid JSON ({error})", "fix it") from None
    except RecursionError:
        raise UserError(name, "is nested too deeply to be records", LAYOUTS) from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and all(isinstance(each, dict) and "paragraphs" in each for each in value):
            return records_of("SQuAD's JSON", _squad(value))
    if not isinstance(value, list):
        raise UserError(f"data '{name}'", *_no_list(value))
    return records_of(
        "JSON", [(number, f"record {number}", each) for number, each in enumerate(value, start=1)]
    )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key `json` keeps the last without a word. Raises `ValueError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shortened(twice)!r} is there twice in one object")
    return found


def _no_list(value: object) -> tuple[str, str]:
    if isinstance(value, dict) and value and all(isinstance(each, dict | list) for each in value.values()):
        return (
            "is a JSON object of columns, not a list of records",
            "write it with pandas' to_json(orient='records')",
        )
    return "is not a JSON list of records", LAYOUTS


def _from_lines(text: str) -> Records:
    values: list[tuple[int, str, Any]] = []
    bad: list[BadRecord] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, f"line {number}", json.loads(line, object_pairs_hook=_each_key_once)))
        except (ValueError, RecursionError) as error:
            why = f"is not valid JSON ({error})"
            bad.append(BadRecord(position=number, place=f"line {number}", why=why))
    if values and all(_is_multirc(value) for _, _, value in values):
        return records_of("MultiRC's JSON lines", _multirc(values), bad)
    return records_of("JSON lines", values, bad)


def records_of(
    form: str,
    values: Iterable[tuple[int, str, Any]],
    bad: Iterable[BadRecord] = (),
    class_names: Mapping[str, tuple[str, ...]] | None = None,
) -> Records:
    """Values with their position and place, those that are objects as records."""
    names: dict[str, None] = {}
    records, refused, replaced = [], list(bad), 0
    for position, place, value in values:
        if not isinstance(value, dict):
            refused.append(BadRecord(position=position, place=place, why="is not a JSON object"))
            continue
        whole, count = _whole(value)
        replaced += count
        records.append(Record(position=position, place=place, values=whole))
        names.update(dict.fromkeys(whole))
    return Records(
        form=form, columns=tuple(names), has_names=True, records=tuple(records), bad=tuple(refused),
        replaced_characters=replaced, class_names=class_names,
    )  # fmt: skip


def _whole(value: Any) -> tuple[Any, int]:
    """With U+FFFD for each half of a character that an escape such as \\ud83d left alone, and how many."""
    if isinstance(value, str):
        return LONE_SURROGATE.subn("\ufffd", value) if not value.isascii() else (value, 0)
    if isinstance(value, list):
        each = [_whole(one) for one in value]
        return [one for one, _ in each], sum(count for _, count in each)
    if isinstance(value, dict):
        pairs = {_whole(key)[0]: _whole(one) for key, one in value.items()}
        return {key: one for key, (one, _) in pairs.items()}, sum(count for _, count in pairs.values())
    return value, 0


def _is_multirc(value: Any) -> bool:
    passage = value.get("passage") if isinstance(value, dict) else None
    return isinstance(passage, dict) and isinstance(passage.get("questions"), list)


def _multirc(passages: Iterable[tuple[int, str, Any]]) -> Iterator[tuple[int, str, Any]]:
    """A record for each answer, as the hub has them, but for the passage's name."""
    position = 0
    for _, place, value in passages:
        passage = value["passage"]
        for number, question in enumerate(passage["questions"], start=1):
            asked = question if isinstance(question, dict) else {}
            answers = asked.get("answers")
            for count, answer in enumerate(answers if isinstance(answers, list) else [{}], start=1):
                position += 1
                given = answer if isinstance(answer, dict) else {}
                record = {
                    "passage": passage.get("text"),
                    "question": asked.get("question"),
                    "answer": given.get("text"),
                    "label": given.get("label"),
                }
                yield position, f"{place}, question {number}, answer {count}", record


def _squad(articles: list[dict[str, Any]]) -> Iterator[tuple[int, str, Any]]:
    """A record for each question, as the hub has them."""
    position = 0
    for number, article in enumerate(articles, start=1):
        for paragraph in article["paragraphs"]:
            asked: list[Mapping[str, Any]] = paragraph.get("qas", []) if isinstance(paragraph, dict) else []
            for question in asked:
                position += 1
                answers = [] if question.get("is_impossible") else question.get("answers")
                record = {
                    "question": question.get("question"),
                    "context": paragraph.get("context"),
                    "answers": answers,
                }
                yield position, f"article {number}, question {question.get('id', position)}", record
