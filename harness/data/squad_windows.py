"""Questions and their texts as windows of tokens, in which the answer is marked. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.errors import UserError

if TYPE_CHECKING:
    from harness.models.tokenizers import Encoded, Tokenizer
from harness.data.records import QuestionExample

OVERLAP = 128
"""Tokens that two windows have in common, but at most half a window. An answer that is no longer is whole in
one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A question and a piece of its context, in tokens."""

    tokens: tuple[int, ...]
    second: int
    """Position of the context's first token."""
    start: int
    end: int
    """Positions of the answer's first and last token; 0 where the piece has none."""


def windows(
    examples: Sequence[QuestionExample], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Window], int]:
    """All windows of `examples` in order, each of at most `seq_len` tokens, and how many examples did not fit
    into one. A question takes at most half of the tokens and loses its end.

    Raises `UserError` for a sequence without room.
    """
    special = len(tokenizer.prefix) + len(tokenizer.between) + len(tokenizer.suffix)
    max_tokens = seq_len - special
    if max_tokens < 2:
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
        asked = question[: max_tokens // 2]
        windows = _windows(len(context.ids), max_tokens - len(asked))
        cut += len(windows) > 1 or len(asked) < len(question)
        head = (*tokenizer.prefix, *asked, *tokenizer.between)
        ends = _ends(example, context)
        for first, last in windows:
            start = end = 0
            if ends is not None and first <= ends[0] and ends[1] < last:
                start, end = (len(head) + place - first for place in ends)
            tokens = (*head, *context.ids[first:last], *tokenizer.suffix)
            found.append(Window(tokens=tokens, second=len(head), start=start, end=end))
    return found, cut


def _windows(length: int, max_tokens: int) -> list[tuple[int, int]]:
    """(first, behind the last) of windows of `max_tokens` tokens that overlap and cover `length` tokens."""
    step = max_tokens - min(OVERLAP, max_tokens // 2)
    starts = range(0, max(1, length - max_tokens + step), step)
    return [(start, min(start + max_tokens, length)) for start in starts]


def _ends(example: QuestionExample, context: Encoded) -> tuple[int, int] | None:
    """Places of the first and last token of the context that have characters of the answer."""
    if example.answer is None:
        return None
    start, end = example.answer
    inside = [i for i, (first, last) in enumerate(context.places) if first < end and last > start]
    return (inside[0], inside[-1]) if inside else None
