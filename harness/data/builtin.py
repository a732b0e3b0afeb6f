"""The built-in task, made of word lists so that the demo needs no download. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from harness.data.records import LabelledExample, QuestionExample

# Words of praise hold the letter v, words of blame the letter u, and no other word holds either: a tiny
# model that reads bytes finds them within a hundred steps.
_THINGS = (
    "film", "plot", "cast", "story", "ending", "acting", "script", "melody",
    "pace", "hero", "scene", "song", "joke", "show", "design", "camera",
)  # fmt: skip


_BLAME = ("dull", "clumsy", "crude", "muddled", "ugly", "stupid", "tedious", "ludicrous")


_PRAISE = ("lovely", "vivid", "clever", "moving", "lively", "brave", "inventive", "vibrant")


_DEGREES = ("", "really ", "rather ", "so ")


_SENTENCES: tuple[Callable[[str, str, str], str], ...] = (
    lambda thing, degree, word: f"the {thing} is {degree}{word}",
    lambda thing, degree, word: f"to me the {thing} was {degree}{word}",
    lambda thing, degree, word: f"what a {degree}{word} {thing}",
    lambda thing, degree, word: f"it has a {degree}{word} {thing}",
    lambda thing, degree, word: f"{degree}{word} , that {thing}",
)


_BUILTIN_TRAINING, _BUILTIN_HELD_OUT = 1024, 256


def builtin_reviews() -> tuple[tuple[LabelledExample, ...], tuple[LabelledExample, ...]]:
    """(training, held out): one-line reviews of two classes, 0 bad and 1 good, in equal parts.

    Made from word lists, so that the demo needs no download. All sentences differ; held-out ones use
    known words in new combinations.
    """
    chooser = random.Random(0)
    by_class = []
    for label, words in enumerate((_BLAME, _PRAISE)):
        texts = sorted(
            {
                sentence(thing, degree, word)
                for sentence in _SENTENCES
                for thing in _THINGS
                for degree in _DEGREES
                for word in words
            }
        )
        chosen = chooser.sample(texts, (_BUILTIN_TRAINING + _BUILTIN_HELD_OUT) // 2)
        by_class.append([LabelledExample(text=text, label=label, place="built in") for text in chosen])
    rows = tuple(example for pair in zip(*by_class, strict=True) for example in pair)
    return rows[:_BUILTIN_TRAINING], rows[_BUILTIN_TRAINING:]


def builtin_questions(reviews: Sequence[LabelledExample]) -> tuple[QuestionExample, ...]:
    """The built-in reviews as texts in which to find the word that judges."""
    found = []
    for review in reviews:
        word = next(word for word in review.text.split() if word in _BLAME + _PRAISE)
        start = review.text.index(word)
        answer = (start, start + len(word))
        found.append(QuestionExample(question="how is it?", context=review.text, answer=answer))
    return tuple(found)
