"""Questions whose answer stands in a given text: records of them, and windows of tokens. Imports no torch.

What a model is to find are the first and the last token of the answer (SQuAD, Rajpurkar et al., 1606.05250).
A text that is too long is cut into windows that overlap; each is an example of its own, and one without the
whole answer is labelled with its first position, as is a question without an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.errors import UserError

if TYPE_CHECKING:
    from harness.tokens import Encoded, Tokenizer

QUESTION_KEYS = (
    'with "question", "context" and "answers" ({"text": [...], "answer_start": [...]}), or "answer_start" and'
    ' "answer_end"'
)

OVERLAP = 128
"""Tokens that two windows have in common, but at most half a window. An answer that is no longer is whole in
one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionExample:
    question: str
    context: str
    answer: tuple[int, int] | None
    """Its characters in `context`, from first to before last; `None`: the context has no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A question and a piece of its context, in tokens."""

    tokens: tuple[int, ...]
    second: int
    """Position of the context's first token."""
    start: int
    end: int
    """Positions of the answer's first and last token; 0 where the piece has none."""


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


def windows(
    examples: Sequence[QuestionExample], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Window], int]:
    """All windows of `examples` in order, each of at most `seq_len` tokens, and how many examples did not fit
    into one. A question takes at most half of the room and loses its end.

    Raises `UserError` for a sequence without room.
    """
    special = len(tokenizer.prefix) + len(tokenizer.between) + len(tokenizer.suffix)
    room = seq_len - special
    if room < 2:
        raise UserError(
            f"--seq-len {seq_len}",
            "leaves no room for a question and a text beside the special tokens",
            f"use --seq-len {special + 2} or more",
        )
    questions = tokenizer.encode([example.question for example in examples])
    contexts = tokenizer.encode_places([example.context for example in examples])
    found: list[Window] = []
    cut = 0
    for example, question, context in zip(examples, questions, contexts, strict=True):
        asked = question[: room // 2]
        pieces = _pieces(len(context.ids), room - len(asked))
        cut += len(pieces) > 1 or len(asked) < len(question)
        head = (*tokenizer.prefix, *asked, *tokenizer.between)
        ends = _ends(example, context)
        for first, last in pieces:
            start = end = 0
            if ends is not None and first <= ends[0] and ends[1] < last:
                start, end = (len(head) + place - first for place in ends)
            tokens = (*head, *context.ids[first:last], *tokenizer.suffix)
            found.append(Window(tokens=tokens, second=len(head), start=start, end=end))
    return found, cut


def _pieces(length: int, room: int) -> list[tuple[int, int]]:
    """From first to before last of pieces that overlap and cover `length` tokens, `room` tokens each."""
    step = room - min(OVERLAP, room // 2)
    starts = range(0, max(1, length - room + step), step)
    return [(start, min(start + room, length)) for start in starts]


def _ends(example: QuestionExample, context: Encoded) -> tuple[int, int] | None:
    """Places of the first and last token of the context that have characters of the answer."""
    if example.answer is None:
        return None
    start, end = example.answer
    inside = [i for i, (first, last) in enumerate(context.places) if first < end and last > start]
    return (inside[0], inside[-1]) if inside else None
