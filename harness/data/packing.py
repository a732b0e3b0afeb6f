"""Text and documents as sequences of one length, end to end and without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engines.errors import UserError
from harness.data.examples import held_out_count
from harness.data.records import Examples
from harness.data.token_tables import TokenTable
from harness.models.tokenizers import Tokenizer
from harness.records.job import Job

_CHUNK_CHARACTERS = 1 << 20
"""Text goes to the tokenizer in pieces of about this length."""


def text_tables(examples: Examples, tokenizer: Tokenizer, job: Job) -> tuple[TokenTable, TokenTable]:
    """Blocks of `seq_len` tokens, all labelled; the end of a text is held out if no file is given, of many
    documents some that were drawn."""
    if examples.documents:
        train = blocks_of(_document_tokens(examples.documents, tokenizer), job.seq_len, job.data.train)
        return train, _held_out_blocks(examples, tokenizer, job)
    train = blocks_of(_text_tokens(examples.text, tokenizer), job.seq_len, job.data.train)
    if job.data.evaluate is not None:
        return train, _held_out_blocks(examples, tokenizer, job)
    kept = len(train) - held_out_count(len(train))
    return (
        slice_blocks(train, 0, kept, job.seq_len),
        slice_blocks(train, kept, len(train), job.seq_len),
    )


def _held_out_blocks(examples: Examples, tokenizer: Tokenizer, job: Job) -> TokenTable:
    """Of a held-out file, or of the documents that are held out, which may be too few for one block."""
    tokens = (
        _text_tokens(examples.text_held_out, tokenizer)
        if examples.text_held_out is not None
        else _document_tokens(examples.documents_held_out, tokenizer)
    )
    if job.data.evaluate is None and tokens.numel() < job.seq_len:
        return packed_table(tokens[:0], 0, job.seq_len)
    return blocks_of(tokens, job.seq_len, job.data.evaluate or job.data.train)


def _document_tokens(documents: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Documents one after the other, each between the model's own marks of a beginning and an end."""
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    chunks = [
        torch.tensor([*tokenizer.prefix, *ids, *end], dtype=torch.int32)
        for ids in tokenizer.encode(documents)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int32)


def _text_tokens(text: str, tokenizer: Tokenizer) -> Tensor:
    chunks: list[Tensor] = []
    lines: list[str] = []
    length = 0
    for line in (*text.splitlines(keepends=True), None):
        if line is not None:
            lines.append(line)
            length += len(line)
        if line is None or length >= _CHUNK_CHARACTERS:
            ids = [index for encoded in tokenizer.encode(lines) for index in encoded]
            chunks.append(torch.tensor(ids, dtype=torch.int32))
            lines, length = [], 0
    return torch.cat(chunks)


def blocks_of(tokens: Tensor, seq_len: int, path: str) -> TokenTable:
    """One text, (tokens,) int32, as sequences of `seq_len` tokens; what is left of it at its end is not used.

    Raises `UserError` where it is shorter than one.
    """
    rows = tokens.numel() // seq_len
    if rows == 0:
        raise UserError(
            f"data '{path}'",
            f"holds {tokens.numel()} tokens, fewer than one sequence of {seq_len}",
            "give more text or a smaller --seq-len",
        )
    return packed_table(tokens[: rows * seq_len], rows, seq_len)


def slice_blocks(table: TokenTable, first: int, last: int, seq_len: int) -> TokenTable:
    return packed_table(table.tokens[first * seq_len : last * seq_len], last - first, seq_len)


def end_to_end(table: TokenTable, seq_len: int) -> TokenTable:
    """Rows one after the other in blocks of `seq_len`, so that a long sequence is not mostly padding.

    A row that is cut by the end of a block has no label. Where a block would hold fewer than four of the
    longest rows, they stay apart.
    """
    assert table.first_labelled is not None
    lengths = table.starts.diff()
    blocks = table.tokens.numel() // seq_len
    if blocks == 0 or seq_len < 4 * int(lengths.max()):
        return table
    position = torch.arange(table.tokens.numel())
    start = table.starts[:-1].repeat_interleave(lengths)
    last = (table.starts[1:] - 1).repeat_interleave(lengths)
    labelled = position >= start + table.first_labelled.repeat_interleave(lengths)
    whole = start // seq_len == last // seq_len
    kept = blocks * seq_len
    packed = packed_table(table.tokens[:kept], blocks, seq_len)
    return replace(
        packed, unlabelled=~(labelled & whole)[:kept], class_tokens=table.class_tokens, cut=table.cut
    )


def packed_table(tokens: Tensor, rows: int, seq_len: int) -> TokenTable:
    """`tokens`, (rows x seq_len,) int32, as that many sequences without padding, labelled throughout."""
    return TokenTable(
        tokens=tokens,
        starts=torch.arange(rows + 1, dtype=torch.int64) * seq_len,
        first_labelled=torch.zeros(rows, dtype=torch.int64),
        classes=None,
        packed=True,
    )
