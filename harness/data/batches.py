"""Batches from random tokens, text, labelled sentences, instruction records or questions.

What a step trains on is a function of the job's seed and the step alone, so a resumed run goes on
exactly; every method of a comparison sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from engines.base import Batch
from engines.errors import UserError
from engines.shapes import ModelShape
from harness.data.chat_tokens import chat_table
from harness.data.examples import examples_of
from harness.data.reading.files import BadRecord
from harness.data.reading.read import check_bad, told_bad
from harness.data.records import Examples
from harness.data.token_tables import (
    TokenTable,
    answer_table,
    class_table,
    end_to_end,
    instruction_table,
    question_table,
    questions_of,
    text_tables,
)
from harness.data.tokenized import Tokenized
from harness.models.configs import load_config
from harness.models.tokenizers import Tokenizer, load_tokenizer
from harness.records.job import Job
from harness.records.seeds import derive_seed


class Data:
    """The batches of a job. Tensors live on the host."""

    def __init__(
        self,
        *,
        micro_batch: Callable[[int], Batch],
        accumulation: int,
        evaluation: list[Batch],
        description: str,
        readings: tuple[str, ...] = (),
        label_names: tuple[str, ...] = (),
    ) -> None:
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._description = description
        self.evaluation = evaluation
        """Held-out batches, which training never sees; the last may be smaller."""
        self.readings = readings
        """A line for each file: how it was read, and what of it could not be used."""
        self.label_names = label_names
        """Of the classes, in their order; empty where the data numbers them from 0."""

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, counted from 0."""
        first = step * self._accumulation
        return [self._micro_batch(index) for index in range(first, first + self._accumulation)]

    def describe(self) -> str:
        """One line: what it is, how many examples and tokens, and what had to be cut."""
        return self._description


def make_data(job: Job, shape: ModelShape) -> Data:
    """The data of `job` for a model of `shape`. Raises `UserError` as `tokenize` does."""
    tokenized = tokenize(job, shape)
    return _random_data(job, shape) if tokenized is None else batches_of(tokenized, job)


def tokenize(job: Job, shape: ModelShape) -> Tokenized | None:
    """The data of `job` in tokens, for a model of `shape`; `None` where tokens are drawn at random.

    Raises `UserError` for files that are missing or malformed, that hold too little, or that do not suit
    the model's head.
    """
    if job.data.train == "random":
        return None
    examples = examples_of(job, load_config(job.model))
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    bad: tuple[list[BadRecord], list[BadRecord]] = ([], [])
    if examples.kind == "text":
        train, held_out = text_tables(examples, tokenizer, job)
    elif examples.kind == "chats":
        (train, bad_train), (held_out, bad_held_out) = (
            chat_table(rows, tokenizer, job.seq_len) for rows in (examples.chats, examples.chats_held_out)
        )
        bad = bad_train, bad_held_out
    elif examples.kind == "instructions":
        train, held_out = (
            instruction_table(rows, tokenizer, job.seq_len)
            for rows in (examples.instructions, examples.instructions_held_out)
        )
    elif shape.head == "question_answering":
        train, held_out = (question_table(rows, tokenizer, job.seq_len) for rows in questions_of(examples))
    elif shape.head == "classification":
        if examples.num_labels > shape.num_labels:
            raise UserError(
                f"data '{job.data.train}'",
                f"has {examples.num_labels} classes, the model's head has {shape.num_labels}",
                "use a model with a matching head",
            )
        train, held_out = (
            class_table(rows, tokenizer, job.seq_len)
            for rows in (examples.labelled, examples.labelled_held_out)
        )
    else:
        train, held_out = (
            answer_table(rows, examples.num_labels, tokenizer, job.seq_len)
            for rows in (examples.labelled, examples.labelled_held_out)
        )
        if examples.kind == "builtin":
            train, held_out = end_to_end(train, job.seq_len), end_to_end(held_out, job.seq_len)
    readings = [str(reading) for reading in examples.readings]
    readings += _left_out(examples, job, bad)
    return _tokenized(job, examples, train, held_out, tokenizer, tuple(readings))


def _left_out(
    examples: Examples, job: Job, bad: tuple[Sequence[BadRecord], Sequence[BadRecord]]
) -> Iterator[str]:
    """A line for each part of which something could not be brought into tokens. Raises `UserError` where that
    is not to be, or too much."""
    held_out = job.data.train if job.data.evaluate is None else job.data.evaluate
    parts = ((job.data.train, bad[0], examples.chats), (held_out, bad[1], examples.chats_held_out))
    for source, records, rows in parts:
        check_bad(source, records, len(rows), job.data)
        if records:
            told = told_bad(records)
            yield f"{Path(source).name}: {told.count:,} left out, the first in {told.first}"


def _tokenized(
    job: Job,
    examples: Examples,
    train: TokenTable,
    held_out: TokenTable,
    tokenizer: Tokenizer,
    readings: tuple[str, ...],
) -> Tokenized:
    if len(train) == 0:
        raise UserError(f"data '{job.data.train}'", "holds no training example", "give a file with more")
    if job.eval_batches and len(held_out) == 0:
        raise UserError(
            f"data '{job.data.train}'",
            "is too small to hold a part out for the evaluation",
            "give an evaluation set, or evaluate no batches",
        )
    what = (
        "built-in reviews" if examples.kind == "builtin" else f"{examples.kind} {Path(job.data.train).name}"
    )
    unit = "blocks" if train.packed else "examples" if train.answers is None else "windows"
    cut = train.cut + held_out.cut
    what_was_cut = "cut to" if train.answers is None else "examples beyond"
    description = (
        f"{what}: {len(train):,} training and {len(held_out):,} held-out {unit}, "
        f"{train.tokens.numel():,} training tokens ({tokenizer.name})"
        + (f", {cut:,} {what_was_cut} {job.seq_len} tokens" if cut else "")
    )
    return Tokenized(
        train=train, held_out=held_out, pad_id=tokenizer.pad_id, description=description, readings=readings,
        label_names=examples.label_names,
    )  # fmt: skip


def batches_of(tokenized: Tokenized, job: Job) -> Data:
    """The batches that `job` takes of its data."""
    train, held_out, pad_id = tokenized.train, tokenized.held_out, tokenized.pad_id

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "epoch", epoch))
        return [int(row) for row in torch.randperm(len(train), generator=generator)]

    def micro_batch(index: int) -> Batch:
        """Batches follow one another through an endless row of shuffled epochs."""
        places = range(index * job.batch_size, (index + 1) * job.batch_size)
        rows = [order(place // len(train))[place % len(train)] for place in places]
        return train.batch(rows, job.seq_len, pad_id)

    evaluated = min(len(held_out), job.eval_batches * job.batch_size)
    evaluation = [
        held_out.batch(range(first, min(first + job.batch_size, evaluated)), job.seq_len, pad_id)
        for first in range(0, evaluated, job.batch_size)
    ]
    return Data(
        micro_batch=micro_batch,
        accumulation=job.accumulation,
        evaluation=evaluation,
        description=tokenized.description,
        readings=tokenized.readings,
        label_names=tokenized.label_names,
    )


def _random_data(job: Job, shape: ModelShape) -> Data:
    """Uniform tokens, for speed and memory: nothing in them can be learnt."""
    size = (job.batch_size, job.seq_len)

    def batch(purpose: str, index: int) -> Batch:
        generator = torch.Generator().manual_seed(derive_seed(job.seed, purpose, index))
        ids = torch.randint(shape.vocabulary, size, generator=generator)
        if shape.head == "causal_lm":
            return Batch(inputs={"input_ids": ids, "labels": ids.clone()})
        if shape.head == "question_answering":
            ends = torch.randint(job.seq_len, (job.batch_size, 2), generator=generator).sort(1).values
            starts, stops = ends.unbind(1)
            return Batch(inputs={"input_ids": ids, "start_positions": starts, "end_positions": stops})
        labels = torch.randint(shape.num_labels, size[:1], generator=generator)
        return Batch(inputs={"input_ids": ids, "labels": labels})

    return Data(
        micro_batch=lambda index: batch("random training", index),
        accumulation=job.accumulation,
        evaluation=[batch("random held-out", index) for index in range(job.eval_batches)],
        description=f"random tokens below {shape.vocabulary:,}, without end: "
        f"{job.workload.tokens_per_step:,} tokens per step",
    )
