"""Examples as they are in a file, before any tokenizer is near. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from harness.records.job import DataKind

RECORD_KEYS = (
    'with "instruction" and "output", or "text" (or "sentence") and "label", or "question", "context" and'
    ' "answers"'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledExample:
    text: str
    label: int
    """Class, counted from 0."""
    place: str
    """Where it stands in its file, such as `line 7`, for error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionExample:
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Training and held-out examples of one kind; the fields of the other kinds are empty.

    `random` has no examples. A text without a held-out file is split once it is in tokens.
    """

    kind: DataKind
    labelled: tuple[LabelledExample, ...] = ()
    labelled_held_out: tuple[LabelledExample, ...] = ()
    instructions: tuple[InstructionExample, ...] = ()
    instructions_held_out: tuple[InstructionExample, ...] = ()
    questions: tuple[QuestionExample, ...] = ()
    questions_held_out: tuple[QuestionExample, ...] = ()
    text: str = ""
    text_held_out: str | None = None

    @property
    def num_labels(self) -> int:
        """Classes of labelled examples; 0 for the other kinds."""
        everything = (*self.labelled, *self.labelled_held_out)
        return 1 + max((example.label for example in everything), default=-1)


def listed(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(record)) or "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionExample:
    question: str
    context: str
    answer: tuple[int, int] | None
    """Its characters in `context`, from first to before last; `None`: the context has no answer."""
