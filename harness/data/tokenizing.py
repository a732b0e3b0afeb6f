"""The data of a job in tokens: text, conversations, instructions, questions, or labelled rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from engines.errors import UserError
from engines.shapes import Head, ModelShape
from harness.data.chat_tokens import chat_table
from harness.data.examples import examples_of
from harness.data.packing import end_to_end, text_tables
from harness.data.reading.files import BadRecord
from harness.data.reading.read import check_bad, left_out_of
from harness.data.records import Examples, LabelledExample
from harness.data.templates import check_template, mask_table, template_table
from harness.data.token_tables import (
    TokenTable,
    answer_table,
    class_table,
    instruction_table,
    question_table,
    questions_of,
    rows_in,
)
from harness.data.tokenized import Tokenized
from harness.models.candidates import Candidates, candidates_of
from harness.models.configs import load_config
from harness.models.tokenizers import Tokenizer, check_knows_tokens, load_tokenizer
from harness.records.job import Job


def tokenize(job: Job, shape: ModelShape) -> Tokenized | None:
    """The data of `job` in tokens, for a model of `shape`; `None` where tokens are drawn at random.

    Raises `UserError` for files that are missing or malformed, that hold too little, or that do not suit
    the model's head; and for trained weights that come without a tokenizer.
    """
    if job.data.train == "random":
        return None
    check_knows_tokens(job.model, shape.vocabulary)
    examples = examples_of(job, load_config(job.model))
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    if job.data.template and (not shape.predicts_tokens or not examples.labelled):
        why = "the data has no classes" if not examples.labelled else f"the head is for {shape.head}"
        raise UserError("--template", why, "use a language model and labelled rows, or leave it out")
    train, held_out, bad = _tables(job, shape, examples, tokenizer)
    readings = [str(reading) for reading in examples.readings]
    readings += _left_out(examples, job, bad)
    seen = tuple(rows_in(held_out, train))
    if examples.kind != "builtin" and seen:
        readings.append(
            f"{len(seen):,} of {len(held_out):,} held-out examples are in the training data too, so that "
            "what is measured on them says nothing of others"
        )
    return _tokenized(job, examples, train, held_out, seen, tokenizer, tuple(readings))


_Bad = tuple[Sequence[BadRecord], Sequence[BadRecord]]
"""Records of the training data, and of what is held out, that could not be brought into tokens."""


def _tables(
    job: Job, shape: ModelShape, examples: Examples, tokenizer: Tokenizer
) -> tuple[TokenTable, TokenTable, _Bad]:
    """What is trained on and what is held out, by the kind of the data and the head of the model. Raises
    `UserError` for classes that the head does not have."""
    none_bad: _Bad = ((), ())
    if examples.kind == "text":
        return *text_tables(examples, tokenizer, job), none_bad
    if examples.kind == "chats":
        train, bad = chat_table(examples.chats, tokenizer, job.seq_len)
        held_out, bad_held_out = chat_table(examples.chats_held_out, tokenizer, job.seq_len)
        return train, held_out, (bad, bad_held_out)
    if examples.kind == "instructions":
        train, held_out = (
            instruction_table(rows, tokenizer, job.seq_len)
            for rows in (examples.instructions, examples.instructions_held_out)
        )
        return train, held_out, none_bad
    if shape.head == "question_answering":
        train, held_out = (question_table(rows, tokenizer, job.seq_len) for rows in questions_of(examples))
        return train, held_out, none_bad
    return *_labelled_tables(job, shape, examples, tokenizer), none_bad


def _labelled_tables(
    job: Job, shape: ModelShape, examples: Examples, tokenizer: Tokenizer
) -> tuple[TokenTable, TokenTable]:
    """For a head with classes; else their words, as `--template` has them or as an answer."""
    both = (examples.labelled, examples.labelled_held_out)
    if shape.head == "classification":
        if examples.num_labels > shape.num_labels:
            raise UserError(
                f"data '{job.data.train}'",
                f"has {examples.num_labels} classes, the model's head has {shape.num_labels}",
                "use a model with a matching head",
            )
        train, held_out = (class_table(rows, tokenizer, job.seq_len) for rows in both)
        return train, held_out
    if job.data.template:
        return _prompts(job, shape.head, examples, tokenizer)
    train, held_out = (
        answer_table(rows, examples.num_labels, examples.label_names, tokenizer, job.seq_len) for rows in both
    )
    if examples.kind != "builtin":
        return train, held_out
    return end_to_end(train, job.seq_len), end_to_end(held_out, job.seq_len)


def _prompts(job: Job, head: Head, examples: Examples, tokenizer: Tokenizer) -> tuple[TokenTable, TokenTable]:
    columns = {name for row in examples.labelled[:1] for name in row.fields}
    check_template(job.data.template, head, is_paired=examples.is_paired, columns=columns)
    candidates = _candidates(job, head, examples.num_labels, tokenizer)

    def table(rows: Sequence[LabelledExample]) -> TokenTable:
        if head == "masked_lm":
            return mask_table(rows, job.data.template, tokenizer, job.seq_len)
        return template_table(rows, job.data.template, candidates, tokenizer, job.seq_len)

    return table(examples.labelled), table(examples.labelled_held_out)


def _candidates(job: Job, head: Head, num_labels: int, tokenizer: Tokenizer) -> Candidates:
    words = job.data.labels
    if len(words) != num_labels:
        raise UserError(
            f"--labels {','.join(words)}",
            f"are {len(words)} words, the data has {num_labels} classes",
            "give a word for each class, in their order",
        )
    return candidates_of(job.data.template, words, tokenizer, head)


def _left_out(examples: Examples, job: Job, bad: _Bad) -> Iterator[str]:
    """A line for each part of which something could not be brought into tokens. Raises `UserError` where that
    is not to be, or too much."""
    held_out = job.data.train if job.data.evaluate is None else job.data.evaluate
    parts = ((job.data.train, bad[0], examples.chats), (held_out, bad[1], examples.chats_held_out))
    for source, records, rows in parts:
        check_bad(source, records, len(rows), job.data)
        if records:
            left_out = left_out_of(records)
            yield f"{Path(source).name}: {left_out.count:,} left out, the first in {left_out.first}"


def _tokenized(
    job: Job,
    examples: Examples,
    train: TokenTable,
    held_out: TokenTable,
    seen: tuple[int, ...],
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
        train=train, held_out=held_out, held_out_in_training=seen, pad_id=tokenizer.pad_id,
        description=description, readings=readings, label_names=examples.label_names,
    )  # fmt: skip
