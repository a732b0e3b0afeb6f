"""Training, development and test data of a study, in tokens."""

from __future__ import annotations

import random
from dataclasses import replace

from engines.errors import UserError
from engines.shapes import ModelShape
from harness.data.batches import tokenize
from harness.data.token_tables import TokenTable
from harness.data.tokenized import Tokenized
from harness.models.candidates import candidates_of
from harness.models.tokenizers import load_tokenizer
from harness.quality.documents import StudySizes
from harness.records.job import Job
from harness.records.learning import Learning, LearningLength


def split(job: Job, shape: ModelShape, test: str | None, sizes: StudySizes) -> Tokenized:
    """The job's data with a part that nothing is chosen by: the file `test`, else every other row of what is
    held out. What is more than `sizes` allow is left out, the same rows for every method and seed.

    Raises `UserError` as training would, and for data of which nothing can be held out.
    """
    whole = tokenize(job, shape)
    if whole is None or len(whole.held_out) < 2:
        raise UserError(
            f"data '{job.data.train}'",
            "leaves nothing to choose by and to test on",
            "give more, or files with --eval-data and --test-data",
        )
    if test is None:
        rows = range(len(whole.held_out))
        development, tested = whole.held_out.select(rows[::2]), whole.held_out.select(rows[1::2])
    else:
        other = tokenize(replace(job, data=replace(job.data, evaluate=test)), shape)
        assert other is not None
        if other.label_names != whole.label_names:
            raise UserError(
                f"--test-data {test}", "has other classes than the training data", "give data of one kind"
            )
        development, tested = whole.held_out, other.held_out
    return replace(
        whole,
        train=_drawn(whole.train, sizes.train),
        held_out=_drawn(development, sizes.development),
        test=_drawn(tested, sizes.test),
    )


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
        by_token = shape.head == "causal_lm" and words.of_one_token
        classes = words.tokens if by_token else tuple(range(words.count))
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
