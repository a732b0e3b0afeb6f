"""Questions whose answer stands in a given text. Imports no torch.

What a model is to find are the first and the last token of the answer (SQuAD, Rajpurkar et al., 1606.05250).
A text that is too long is cut into windows that overlap; each is an example of its own, and one without the
whole answer is labelled with its first position, as is a question without an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.data.reading.files import UnusableError, shortened
from harness.data.records import QuestionExample

QUESTION_KEYS = (
    'with "question", "context" and "answers" ({"text": [...], "answer_start": [...]}), or "answer_start" and'
    ' "answer_end"'
)


def question_example(values: Mapping[str, Any], place: str) -> QuestionExample:
    """A record as SQuAD has them at the hub, or as it is published, the first of its answers; or with
    `answer_start` and `answer_end`, characters from 0, the end not included, null for none.

    Raises `UnusableError`.
    """
    for key in ("question", "context"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise UnusableError(f'"{key}" is missing or empty')
    answer = _answer(values)
    if answer is not None:
        start, end = answer
        if not 0 <= start < end <= len(values["context"]) or not values["context"][start:end].strip():
            raise UnusableError(
                f"its answer, characters {start} to {end}, is not in its context of {len(values['context'])}"
            )
    return QuestionExample(
        question=values["question"].strip(), context=values["context"], answer=answer, place=place
    )


def _answer(values: Mapping[str, Any]) -> tuple[int, int] | None:
    malformed = UnusableError("its answer is missing or malformed")
    if "answers" not in values:
        start, end = values.get("answer_start", ""), values.get("answer_end", "")
        if start is None and end is None:
            return None
        if type(start) is not int or type(end) is not int:
            raise malformed
        return start, end
    answers = values["answers"]
    if isinstance(answers, list):  # as published: an object for each
        if not all(isinstance(answer, dict) for answer in answers):
            raise malformed
        answers = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
    if not isinstance(answers, dict):
        raise malformed
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise malformed
    if not texts:
        return None
    text, start = texts[0], starts[0]
    if not isinstance(text, str) or type(start) is not int:
        raise malformed
    if start < 0 or values["context"][start : start + len(text)] != text:
        raise UnusableError(f"its answer '{shortened(text)}' does not stand at character {start}")
    return start, start + len(text)
