"""Questions whose answer stands in a given text: records of them, and windows of tokens. Imports no torch.

What a model is to find are the first and the last token of the answer (SQuAD, Rajpurkar et al., 1606.05250).
A text that is too long is cut into windows that overlap; each is an example of its own, and one without the
whole answer is labelled with its first position, as is a question without an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engines.errors import UserError
from harness.data.records import QuestionExample

if TYPE_CHECKING:
    pass

QUESTION_KEYS = (
    'with "question", "context" and "answers" ({"text": [...], "answer_start": [...]}), or "answer_start" and'
    ' "answer_end"'
)


def question_example(where: str, record: Mapping[str, Any]) -> QuestionExample:
    """A record as SQuAD has them at the hub, the first of its answers; or with `answer_start` and
    `answer_end`, characters from 0, the end not included, null for none. `where` names it.

    Raises `UserError`.
    """
    for key in ("question", "context"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise UserError(where, f'"{key}" is missing or empty', f"give records {QUESTION_KEYS}")
    answer = _answer(where, record)
    if answer is not None:
        start, end = answer
        if not 0 <= start < end <= len(record["context"]) or not record["context"][start:end].strip():
            raise UserError(
                where,
                f"its answer, characters {start} to {end}, is not in its context of {len(record['context'])}",
                "count characters from 0, the end not included",
            )
    return QuestionExample(question=record["question"].strip(), context=record["context"], answer=answer)


def _answer(where: str, record: Mapping[str, Any]) -> tuple[int, int] | None:
    malformed = UserError(where, "its answer is missing or malformed", f"give records {QUESTION_KEYS}")
    if "answers" not in record:
        start, end = record.get("answer_start", ""), record.get("answer_end", "")
        if start is None and end is None:
            return None
        if type(start) is not int or type(end) is not int:
            raise malformed
        return start, end
    answers = record["answers"]
    texts, starts = (
        answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start")
    )
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise malformed
    if not texts:
        return None
    text, start = texts[0], starts[0]
    if not isinstance(text, str) or type(start) is not int:
        raise malformed
    if start < 0 or record["context"][start : start + len(text)] != text:
        raise UserError(
            where, f"its answer '{text}' does not stand at character {start}", "mend its answer_start"
        )
    return start, start + len(text)
