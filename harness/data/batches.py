"""Batches of a job's data in tokens, or of random tokens.

What a step trains on is a function of the job's seed and the step alone, so a resumed run goes on
exactly; every method of a comparison sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from engines.base import Batch
from engines.shapes import ModelShape
from harness.data.lengths import epoch_order
from harness.data.padding import padded_length
from harness.data.token_tables import TokenTable
from harness.data.tokenized import Tokenized
from harness.data.tokenizing import tokenize
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
        test: list[Batch] | None = None,
        description: str,
        readings: tuple[str, ...] = (),
        label_names: tuple[str, ...] = (),
        num_examples: int | None = None,
        evaluated_in_training: int = 0,
        is_regression: bool = False,
    ) -> None:
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._description = description
        self.evaluation = evaluation
        """Held-out batches; the last may be smaller."""
        self.test = test or []
        """Batches of what nothing is chosen by."""
        self.readings = readings
        """A line for each file: how it was read, and what of it could not be used."""
        self.label_names = label_names
        """Of the classes, in their order; empty where the data numbers them from 0."""
        self.num_examples = num_examples
        """Training sequences; `None`: without end."""
        self.evaluated_in_training = evaluated_in_training
        """Sequences of `evaluation` that are in the training set too."""
        self.is_regression = is_regression
        """Labels are numbers to be predicted."""

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, counted from 0."""
        first = step * self._accumulation
        return [self._micro_batch(index) for index in range(first, first + self._accumulation)]

    def padded_share(self, steps: int) -> float:
        """Of the tokens that the first `steps` steps compute on, the share that is padding."""
        real = computed = 0
        for step in range(steps):
            for batch in self.step_batches(step):
                computed += batch.inputs["input_ids"].numel()
                real += batch.real_tokens
        return 1 - real / computed if computed else 0.0

    def describe(self) -> str:
        """One line: what it is, how many examples and tokens, and what had to be cut."""
        return self._description


def make_data(job: Job, shape: ModelShape) -> Data:
    """The data of `job` for a model of `shape`. Raises `UserError` as `tokenize` does."""
    tokenized = tokenize(job, shape)
    return _random_data(job, shape) if tokenized is None else batches_of(tokenized, job)


def batches_of(tokenized: Tokenized, job: Job, *, evaluated_together: int | None = None) -> Data:
    """The batches that `job` takes of its data. Those of an evaluation have `evaluated_together` sequences,
    by default as many as in training.

    The built-in task keeps its batches, whatever `job.padding` says: published runs are on them.
    """
    train, held_out, pad_id = tokenized.train, tokenized.held_out, tokenized.pad_id
    together = evaluated_together or job.batch_size
    by_length = job.padding == "longest" and job.data.train != "builtin" and not train.packed
    lengths = train.lengths.numpy()

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "epoch", epoch))
        if by_length:
            begins_within = -epoch * len(train) % job.batch_size
            return epoch_order(lengths, job.seq_len, job.batch_size, begins_within, generator)
        return [int(row) for row in torch.randperm(len(train), generator=generator)]

    def batch_of(table: TokenTable, rows: Sequence[int]) -> Batch:
        seq_len = job.seq_len
        if by_length:
            longest = int(table.lengths[rows].max())
            seq_len = padded_length(longest, job.seq_len)
        return table.batch(rows, seq_len, pad_id)

    def micro_batch(index: int) -> Batch:
        """Batches follow one another through an endless row of shuffled epochs."""
        places = range(index * job.batch_size, (index + 1) * job.batch_size)
        return batch_of(train, [order(place // len(train))[place % len(train)] for place in places])

    def in_batches(table: TokenTable) -> list[Batch]:
        rows = list(range(len(table)))
        if by_length:
            rows.sort(key=lambda row: int(table.lengths[row]))
        firsts = range(0, len(rows), together)
        return [batch_of(table, rows[first : first + together]) for first in firsts]

    evaluated = min(len(held_out), job.eval_batches * job.batch_size)
    chosen = _evaluated_rows(held_out, evaluated, job, by_length=by_length)
    evaluation = [
        batch_of(held_out, chosen[first : first + together]) for first in range(0, evaluated, together)
    ]
    seen = set[int]() if job.data.train == "builtin" else set(tokenized.held_out_in_training)
    return Data(
        micro_batch=micro_batch,
        accumulation=job.accumulation,
        evaluation=evaluation,
        test=[] if tokenized.test is None else in_batches(tokenized.test),
        description=tokenized.description,
        readings=tokenized.readings,
        label_names=tokenized.label_names,
        num_examples=len(train),
        evaluated_in_training=len(seen.intersection(chosen)),
        is_regression=train.classes is not None and train.classes.is_floating_point(),
    )


def _evaluated_rows(held_out: TokenTable, count: int, job: Job, *, by_length: bool) -> list[int]:
    """All held-out rows, or `count` of them drawn by the seed: the first ones of a file may be of one class.

    Those of the built-in task were drawn when they were made.
    """
    rows = list(range(len(held_out)))
    if count < len(rows) and job.data.train != "builtin":
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "evaluation"))
        rows = torch.randperm(len(rows), generator=generator)[:count].sort().values.tolist()
    if by_length:
        rows.sort(key=lambda row: int(held_out.lengths[row]))
    return rows[:count]


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
