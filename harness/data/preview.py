"""Data as a model will see it: some examples in tokens, and what there is of them in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from engines.base import Batch
from engines.model.label_words import WORDS
from engines.shapes import ModelShape
from harness.data.batches import batches_of
from harness.data.examples import examples_of
from harness.data.token_tables import UNLABELLED, row_keys
from harness.data.tokenizing import tokenize
from harness.models.configs import load_config
from harness.models.tokenizers import load_tokenizer
from harness.records.job import Job

PERCENTILES = (0, 10, 50, 90, 99, 100)


MOST_STEPS = 200
"""Of which the padding is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownExample:
    """One row of a batch."""

    tokens: tuple[str, ...]
    """Each token by itself, special ones included, padding left out."""
    learnt: tuple[bool, ...]
    """Which of them the loss counts; none where the label is of the whole sequence."""
    label: str | None
    """Of the whole sequence: a class, a number, or the answer; `None` where tokens are learnt."""
    is_cut: bool
    """It fills the whole sequence, as all do that were longer."""
    padding: int
    """Tokens beside it that only fill the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What `lspzo-bench data` tells."""

    readings: tuple[str, ...]
    description: str
    examples: tuple[ShownExample, ...]
    training: int
    held_out: int
    cut: int
    length_percentiles: Mapping[str, int]
    """Tokens of training examples, before padding."""
    padded_share: float
    """Of the tokens that an epoch computes on, or its first steps."""
    label_counts: Mapping[str, int]
    """Training examples of each class; empty where there are none."""
    duplicates: int
    """Training examples that are there more than once, each counted but for its first."""
    held_out_in_training: int
    """Held-out examples that are in the training set too, so that they say nothing of what was learnt."""


def preview(job: Job, shape: ModelShape, examples: int) -> Preview:
    """The first `examples` rows that training on `job` would see, and numbers on all of its data.

    Raises `UserError` as training would.
    """
    tokenized = tokenize(job, shape)
    assert tokenized is not None, "random tokens have nothing to show"
    data = batches_of(tokenized, job)
    shown: list[ShownExample] = []
    step = 0
    while len(shown) < min(examples, len(tokenized.train)):
        for batch in data.step_batches(step):
            shown += _rows(batch, job, shape, tokenized.label_names)
        step += 1
    train, held_out = tokenized.train, tokenized.held_out
    epoch = -(-len(train) // (job.batch_size * job.accumulation))
    lengths = pd.Series(train.lengths.numpy())
    keys = pd.Series(row_keys(train), dtype=object)
    return Preview(
        readings=tokenized.readings,
        description=tokenized.description,
        examples=tuple(shown[:examples]),
        training=len(train),
        held_out=len(held_out),
        cut=train.cut + held_out.cut,
        length_percentiles={
            f"{each}%": int(lengths.quantile(each / 100, interpolation="higher")) for each in PERCENTILES
        },
        padded_share=data.padded_share(min(epoch, MOST_STEPS)),
        label_counts=_label_counts(job),
        duplicates=int(keys.duplicated().sum()),
        held_out_in_training=len(tokenized.held_out_in_training),
    )


def _label_counts(job: Job) -> dict[str, int]:
    """Of the training part, also where a decoder learns classes as words."""
    examples = examples_of(job, load_config(job.model))
    if examples.is_regression:
        return {}
    counts = Counter(example.label for example in examples.labelled)
    names = examples.label_names
    return {names[label] if names else str(label): counts[label] for label in sorted(counts)}


def _rows(batch: Batch, job: Job, shape: ModelShape, names: Sequence[str]) -> list[ShownExample]:
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    inputs = batch.inputs
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    labels, words = inputs.get("labels"), inputs.get(WORDS)
    if words is not None and labels is not None:
        labels = labels.repeat_interleave(len(ids) // len(labels))
    found = []
    for row in range(len(ids)):
        length = int(mask[row].sum())
        own = ids[row, :length].tolist()
        learnt, label = [False] * length, None
        if labels is None:
            ends = int(inputs["start_positions"][row]), int(inputs["end_positions"][row])
            label = tokenizer.decode(own[ends[0] : ends[1] + 1]) if ends[1] else "no answer here"
        elif labels.dim() == 2:
            learnt = (labels[row, :length] != UNLABELLED).tolist()
        elif labels.is_floating_point():
            label = f"{float(labels[row]):g}"
        else:
            number = int(labels[row])
            label = f"{number} ({names[number]})" if names else str(number)
            if words is not None:
                learnt = (words[row, :length] != UNLABELLED).tolist()
        found.append(
            ShownExample(
                tokens=tuple(tokenizer.show(own)),
                learnt=tuple(learnt),
                label=label,
                is_cut=length == job.seq_len and "attention_mask" in inputs,
                padding=ids.shape[1] - length,
            )
        )
    return found
