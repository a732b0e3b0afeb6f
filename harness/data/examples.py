"""The examples of a job, training and held out, before any tokenizer is near. Imports no torch.

`harness.data.reading` reads a file; here files become the two parts of a job's data. Every fault in a file is
a `UserError` that names the line or the record.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from engines.errors import UserError
from harness.data.builtin import builtin_reviews
from harness.data.reading.read import read_file
from harness.data.records import Examples
from harness.records.job import DataSource, Job

T = TypeVar("T")

HELD_OUT_SHARE = 10
"""One in so many examples is held out where no evaluation set is given."""
MOST_HELD_OUT = 1000

_PARTS = ("labelled", "instructions", "questions", "chats", "documents")


def read_examples(source: DataSource, label_ids: Mapping[str, int] | None = None) -> Examples:
    """The examples of a job, training and held out; the same split for every seed.

    `label_ids` are the classes of the model by name, which words for labels are numbered by if they are the
    same. Raises `UserError` for a path that is missing, empty, of an unknown kind or malformed, and for
    records that cannot be used (`DataSource.strict`, `DataSource.skip_bad`).
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
        reviews, others = builtin_reviews()
        return Examples(kind="builtin", labelled=reviews, labelled_held_out=others)
    read = read_file(source.train, source, label_ids or {})
    if source.evaluate is None:
        return _split(read.examples)
    other = read_file(source.evaluate, source, label_ids or {}, read.classes).examples
    own = read.examples
    if other.kind != own.kind:
        raise UserError(
            source.evaluate,
            f"holds {other.kind} data, the training set holds {own.kind} data",
            "give sets of the same kind",
        )
    if other.is_paired != own.is_paired:
        raise UserError(
            source.evaluate,
            "one of the two sets has pairs of texts, the other has single texts",
            "give sets of the same kind",
        )
    held_out: dict[str, Any] = {f"{name}_held_out": getattr(other, name) for name in _PARTS}
    return replace(
        own,
        **held_out,
        text_held_out=other.text if other.kind == "text" and not other.documents else None,
        readings=(*own.readings, *other.readings),
    )


def examples_of(job: Job, config: Mapping[str, Any]) -> Examples:
    """The examples of `job`, their classes numbered as the model's configuration has them where it knows
    their names. Raises as `read_examples` does."""
    names = config.get("label2id")
    if not isinstance(names, dict) or not all(type(number) is int for number in names.values()):
        return read_examples(job.data)
    return read_examples(job.data, {str(name): number for name, number in names.items()})


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

    parts: dict[str, Any] = {}
    for name in _PARTS:
        parts[name], parts[f"{name}_held_out"] = divide(getattr(read, name))
    return replace(read, **parts)
