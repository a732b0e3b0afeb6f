"""Training, development and test data of a study, in tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from engines.errors import UserError
from engines.shapes import ModelShape
from harness.data.token_tables import TokenTable, rows_in
from harness.data.tokenized import Tokenized
from harness.data.tokenizing import tokenize
from harness.models.candidates import candidates_of
from harness.models.tokenizers import load_tokenizer
from harness.quality.documents import StudySizes
from harness.records.job import Job
from harness.records.learning import Learning, LearningLength


def split(job: Job, shape: ModelShape, test: str | None, sizes: StudySizes) -> Tokenized:
    """The job's data with a part that nothing is chosen by: the file `test`, else half of what is held out,
    drawn so that both halves have as much of each class. What is more than `sizes` allow is left out, the
    same rows for every method and seed.

    Raises `UserError` as training would, for data of which nothing can be held out, and where all that would
    be chosen by, or tested on, is one class.
    """
    whole = tokenize(job, shape)
    if whole is None or len(whole.held_out) < 2:
        raise UserError(
            f"data '{job.data.train}'",
            "leaves nothing to choose by and to test on",
            "give more, or files with --eval-data and --test-data",
        )
    if test is None:
        development, tested = (whole.held_out.select(half) for half in _halves(whole.held_out))
    else:
        other = tokenize(replace(job, data=replace(job.data, evaluate=test)), shape)
        assert other is not None
        if other.label_names != whole.label_names:
            raise UserError(
                f"--test-data {test}", "has other classes than the training data", "give data of one kind"
            )
        development, tested = whole.held_out, other.held_out
    tested = _drawn(tested, sizes.test)
    found = whole.with_tables(
        _drawn(whole.train, sizes.train), _drawn(development, sizes.development), tested
    )
    if test is not None and (seen := len(rows_in(tested, found.train))):
        line = (
            f"{seen:,} of {len(tested):,} test examples are in the training data too, so that what is "
            "measured on them says nothing of others"
        )
        found = replace(found, readings=(*found.readings, line))
    _check_classes(found.train, found.held_out, job.data.evaluate or job.data.train, "development")
    _check_classes(found.train, tested, test or job.data.evaluate or job.data.train, "test")
    return found


def _check_classes(train: TokenTable, part: TokenTable, source: str, what: str) -> None:
    """Raises `UserError` where every row of `part` has the same answer, and those of `train` have several."""
    kinds, among = _answers(part), _answers(train)
    if kinds is None or among is None or len(set(kinds)) > 1 or len(set(among)) < 2:
        return
    raise UserError(
        f"data '{source}'",
        f"gives {len(part)} rows of {what} data, all of one class: nothing can be told by them",
        "give more, or files of all classes with --eval-data and --test-data",
    )


def _halves(table: TokenTable) -> tuple[Sequence[int], Sequence[int]]:
    """Rows of each half, in their order. Files may have their classes in turn, or one after the other."""
    rows, answers = range(len(table)), _answers(table)
    if answers is None:
        return rows[::2], rows[1::2]
    drawn = random.Random(0).sample(rows, len(table))
    by_answer = sorted(drawn, key=lambda row: answers[row])
    return sorted(by_answer[::2]), sorted(by_answer[1::2])


def _answers(table: TokenTable) -> Sequence[Any] | None:
    """What is to be said of each row, a class, a number or tokens; `None`: rows are text, or spans of it."""
    if table.classes is not None:
        return cast("list[float]", table.classes.tolist())
    if table.first_labelled is None or table.packed:
        return None
    bounds = zip(table.starts[:-1] + table.first_labelled, table.starts[1:], strict=True)
    return [tuple(table.tokens[begin:end].tolist()) for begin, end in bounds]


def _drawn(table: TokenTable, most: int | None) -> TokenTable:
    if most is None or len(table) <= most:
        return table
    return table.select(sorted(random.Random(0).sample(range(len(table)), most)))


def learning_of(
    job: Job,
    shape: ModelShape,
    tokenized: Tokenized,
    metric: str,
    length: LearningLength,
    *,
    tests: bool,
    rows_evaluated_together: int,
) -> Learning:
    """What a trial of that length is to learn."""
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    classes: tuple[int, ...] = ()
    if job.data.template:
        words = candidates_of(job.data.template, job.data.labels, tokenizer, shape.head)
        classes = words.labels(shape.head)
    kinds = tokenized.train.classes
    return Learning(
        length=length,
        metric=metric,
        classes=classes,
        is_regression=kinds is not None and kinds.is_floating_point(),
        is_bytes=tokenizer.name == "bytes",
        tests=tests,
        rows_evaluated_together=rows_evaluated_together,
    )
