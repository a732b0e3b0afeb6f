"""Labels as a file has them, words or numbers, as classes from 0 or as numbers to be predicted. No torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.errors import UserError
from harness.data.reading.files import UnusableError, shortened

Label = int | float | str

MOST_DIGITS = 18
"""Of a label that is a number."""

_INTEGER = re.compile(r"[+-]?\d+")

FEW = 10
"""Up to one label in so many may be unlike the others, and its record is left out."""


def read_label(value: object) -> Label:
    """A label as it is meant: a number, also where it was written as text, or a word.

    Raises `UnusableError` for what is missing and for what is no single value.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise UnusableError("its label is missing")
        return _number(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableError("its label is missing")
    if not isinstance(value, str):
        kind = "a list" if isinstance(value, list) else "an object"
        raise UnusableError(f"its label is {kind}, not one word or number")
    word = value.strip()
    if _INTEGER.fullmatch(word):
        if len(word) > MOST_DIGITS:
            raise UnusableError(f"its label is a number of {len(word)} digits")
        return int(word)
    try:
        number = float(word)
    except ValueError:
        return word
    # A class may well be called "nan" or "infinity".
    return _number(number) if math.isfinite(number) else word


def _number(value: float) -> int | float:
    if not math.isfinite(value):
        raise UnusableError(f"its label is {value}")
    return int(value) if value.is_integer() else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """How the labels of a training set are numbered."""

    number_of: Mapping[Label, int]
    """Class of each label; empty in regression."""
    names: tuple[str, ...] = ()
    """In the order of their numbers; empty where the file's labels are the numbers, and in regression."""
    is_regression: bool = False
    words_are_unusable: bool = False
    """The labels are numbers but for a few."""
    minus_one_is_none: bool = False
    """-1 stands for no label, as in SNLI."""

    def number(self, label: Label) -> tuple[int, float | None]:
        """(class, target) of a label. Raises `UnusableError` for one that is not among the training set's."""
        if isinstance(label, str) and (self.words_are_unusable or self.is_regression):
            raise UnusableError(f"label '{shortened(label)}' is not a number, as the others are")
        if self.is_regression:
            return 0, float(label)
        if label == -1 and self.minus_one_is_none:
            raise UnusableError("label -1 marks that there is none")
        key = str(label) if self.names and label not in self.number_of else label
        if key not in self.number_of:
            raise UnusableError(
                f"label {_shown(label)} is not among the training set's labels {self.listed()}"
            )
        return self.number_of[key], None

    def listed(self) -> str:
        """All classes, or the first and the last of many."""
        names = self.names or [str(number) for number in range(len(self.number_of))]
        if self.names and len(names) <= 6:
            return ", ".join(f"{shortened(name)} {number}" for number, name in enumerate(names))
        return f"{shortened(names[0])} to {shortened(names[-1])}"


def _shown(label: Label) -> str:
    return f"'{shortened(label)}'" if isinstance(label, str) else str(label)


def number_classes(
    where: str, labels: Sequence[Label], label_ids: Mapping[str, int], *, is_target: bool
) -> Classes:
    """The classes of a training set with these `labels`, or that it is a regression.

    Numbers that go from 0 without gaps stay as they are, other numbers and words are sorted, unless the
    model's `label_ids` have all of the words: then they are numbered as there. Numbers with fractions are to
    be predicted, and so are all numbers where the user says so (`is_target`).

    Raises `UserError` for labels that make no classes.
    """
    words = {label for label in labels if isinstance(label, str)}
    num_words = sum(isinstance(label, str) for label in labels)
    few_words = num_words * FEW <= len(labels)
    if is_target or any(isinstance(label, float) for label in labels):
        if not few_words:
            raise UserError(
                where,
                f"has labels such as {_shown(min(words))}, which are no numbers to be predicted",
                "use --columns ...,label=NAME for classes",
            )
        return Classes(number_of={}, is_regression=True, words_are_unusable=True)
    if words and few_words and num_words < len(labels):
        return _of_numbers(where, labels, words_are_unusable=True)
    if not words:
        return _of_numbers(where, labels, words_are_unusable=False)
    if num_words < len(labels) and (len(labels) - num_words) * FEW > len(labels):
        number = next(label for label in labels if not isinstance(label, str))
        raise UserError(
            where,
            f"has numbers and words for labels, such as {number} and {_shown(min(words))}",
            "use one of the two, or say with --columns which column is the label",
        )
    return _of_words(where, {str(label) for label in labels}, len(labels), label_ids)


def _of_numbers(where: str, labels: Sequence[Label], *, words_are_unusable: bool) -> Classes:
    values = {label for label in labels if isinstance(label, int)}
    others = values - {-1}
    rest = range(len(others))
    is_none = -1 in values and labels.count(-1) * FEW <= len(labels) and others == set(rest)
    if is_none:
        values = others
    if len(labels) >= FEW and 2 * len(values) > len(labels):
        raise UserError(
            where,
            f"has {len(values):,} different labels in {len(labels):,} records, such as {max(values)}",
            "say which column is the label: --columns text=NAME,label=NAME, or target=NAME for numbers",
        )
    if len(values) < 2:
        raise UserError(
            where, f"every label is {next(iter(values), 'missing')}", "give examples of at least two classes"
        )
    order = sorted(values)
    plain = order == [*range(len(order))]
    return Classes(
        number_of={value: number for number, value in enumerate(order)},
        names=() if plain else tuple(str(value) for value in order),
        words_are_unusable=words_are_unusable,
        minus_one_is_none=is_none,
    )


def _of_words(where: str, words: set[str], num_labels: int, label_ids: Mapping[str, int]) -> Classes:
    if num_labels >= FEW and 2 * len(words) > num_labels:
        raise UserError(
            where,
            f"has {len(words):,} different labels in {num_labels:,} records, such as {_shown(min(words))}",
            "say which column is the label, such as --columns text=NAME,label=NAME",
        )
    if len(words) < 2:
        raise UserError(where, f"every label is {_shown(*words)}", "give examples of at least two classes")
    by_name = {name.casefold(): number for name, number in label_ids.items()}
    if all(word.casefold() in by_name for word in words) and sorted(by_name.values()) == [
        *range(len(by_name))
    ]:
        names = tuple(sorted(label_ids, key=lambda name: label_ids[name]))
        return Classes(number_of={word: by_name[word.casefold()] for word in words}, names=names)
    order = sorted(words, key=lambda word: (word.casefold(), word))  # else True would come before false
    alike = Counter(word.casefold() for word in order)
    if twice := [word for word in order if alike[word.casefold()] > 1]:
        one = next(word for word in twice[1:] if word.casefold() == twice[0].casefold())
        raise UserError(
            where,
            f"has labels that differ in capitals alone, such as {_shown(twice[0])} and {_shown(one)}",
            "write them alike, or as different words",
        )
    return Classes(number_of={word: number for number, word in enumerate(order)}, names=tuple(order))
