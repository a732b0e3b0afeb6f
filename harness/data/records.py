"""Examples as they are in a file, before any tokenizer is near. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from harness.records.job import DataKind


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledExample:
    """One or two texts with a class, or with a number that is to be predicted."""

    text: str
    second: str | None = None
    """The second text of a pair; `None` in data of single texts."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further texts of the row, by the columns that the template or the label words name."""
    label: int
    """Class, counted from 0; 0 where there is a `target`."""
    target: float | None = None
    """What a regression is to predict; `None` where there are classes."""
    place: str
    """Where it stands in its file, such as `line 7`, for error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionExample:
    """A prompt as the model sees it, and the answer that it is to learn."""

    prompt: str
    answer: str
    place: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionExample:
    """A question whose answer stands in a text."""

    question: str
    context: str
    answer: tuple[int, int] | None
    """Its characters in `context`, from first to before last; `None`: the context has no answer."""
    place: str = ""


ChatRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    role: ChatRole
    content: str
    is_learnt: bool
    """The loss counts it: a turn of the assistant that is not only there for its context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatExample:
    """Turns of a conversation, in their order. At least one of them is learnt."""

    turns: tuple[Turn, ...]
    place: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Records of a file that cannot be used."""

    count: int = 0
    first: str = ""
    """Of the first one, where it stands and why it cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a file was read, to be shown before anything is trained on it."""

    name: str
    """Of the file, without its folder, or of the data set."""
    form: str
    """Such as `CSV with a header`."""
    meaning: str
    """What was taken for what, such as `text = review, label = stars`."""
    records: int
    """All that the file holds, those left out included; 0 of a plain text, which has none."""
    left_out: LeftOut = LeftOut()
    replaced_characters: int = 0
    """Halves of characters that no text can hold (lone surrogates), U+FFFD in their place."""

    def __str__(self) -> str:
        parts = [self.form, self.meaning, f"{self.records:,} records" if self.records else ""]
        if self.left_out.count:
            parts.append(f"{self.left_out.count:,} left out, the first in {self.left_out.first}")
        if self.replaced_characters:
            parts.append(f"{self.replaced_characters:,} broken characters replaced")
        return f"{self.name}: " + "; ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Training and held-out examples of one kind; the fields of the other kinds are empty.

    `random` has no examples. A text without a held-out file is split once it is in tokens.
    """

    kind: DataKind
    labelled: tuple[LabelledExample, ...] = ()
    labelled_held_out: tuple[LabelledExample, ...] = ()
    label_names: tuple[str, ...] = ()
    """Of the classes, in their order; empty where the file numbers them from 0, and in regression."""
    instructions: tuple[InstructionExample, ...] = ()
    instructions_held_out: tuple[InstructionExample, ...] = ()
    questions: tuple[QuestionExample, ...] = ()
    questions_held_out: tuple[QuestionExample, ...] = ()
    chats: tuple[ChatExample, ...] = ()
    chats_held_out: tuple[ChatExample, ...] = ()
    text: str = ""
    text_held_out: str | None = None
    documents: tuple[str, ...] = ()
    documents_held_out: tuple[str, ...] = ()
    """Texts of kind `text` that come apart, one a record, in place of `text`."""
    readings: tuple[Reading, ...] = ()
    """Of the training file and of the held-out file, as far as there are any."""

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to be predicted, not classes."""
        return any(example.target is not None for example in self._all_labelled[:1])

    @property
    def is_paired(self) -> bool:
        """Whether labelled examples have two texts."""
        return any(example.second is not None for example in self._all_labelled[:1])

    @property
    def num_labels(self) -> int:
        """Classes of labelled examples, 1 in regression; 0 for the other kinds."""
        if self.is_regression:
            return 1
        own = 1 + max((example.label for example in self._all_labelled), default=-1)
        return max(own, len(self.label_names))

    @property
    def _all_labelled(self) -> Sequence[LabelledExample]:
        return (*self.labelled, *self.labelled_held_out)
