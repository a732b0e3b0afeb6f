"""Labelled rows as prompts: a template with the row's texts in it, and a place for the word of its class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from engines.errors import UserError
from engines.shapes import Head
from harness.data.fields import TEXTS, names_in_braces
from harness.data.records import LabelledExample
from harness.data.token_tables import TokenTable, prompt_table, shares, table_of
from harness.models.candidates import MASK, Candidates
from harness.models.tokenizers import Tokenizer


def check_template(template: str, head: Head, *, is_paired: bool, columns: Collection[str] = ()) -> None:
    """Raises `UserError` for a template that does not say where the row's texts belong, or the mask. Rows
    have `columns` beside them."""
    named = names_in_braces(template, "--template")
    unknown = [name for name in named if name not in TEXTS and name not in columns]
    if unknown or "text" not in named:
        why = f"{{{unknown[0]}}} is no text of a row" if unknown else "does not say where the text belongs"
        raise UserError("--template", why, "use {text}, and {text2} for the second of a pair")
    if is_paired != ("text2" in named):
        why = "leaves out the second text of each row" if is_paired else "names a second text, rows have one"
        raise UserError("--template", why, "use {text2}" if is_paired else "leave out {text2}")
    if head == "masked_lm" and template.count(MASK) != 1:
        raise UserError("--template", "needs one place for the word", "such as '{text} It was {mask}.'")
    if head != "masked_lm" and "mask" in named:
        raise UserError("--template", "a decoder has no mask: its word comes last", "leave out {mask}")


def rendered(template: str, row: LabelledExample) -> str:
    """The prompt of a row. A line break is written as it is, or as backslash n."""
    texts = {"text": row.text, "text2": row.second or "", "mask": ""}
    return template.replace("\\n", "\n").format(**texts, **row.fields)


def template_table(
    rows: Sequence[LabelledExample],
    template: str,
    candidates: Candidates,
    tokenizer: Tokenizer,
    seq_len: int,
) -> TokenTable:
    """A row's prompt without loss, then the word of its class with it, if that is one token; else the prompt
    once for each class, with its word. Long prompts lose their beginning, as many tokens for every class.

    Raises `UserError` where `seq_len` leaves no room beside a label.
    """
    prompts = tokenizer.encode([rendered(template, row) for row in rows])
    if candidates.of_one_token:
        answers = [[candidates.tokens[row.label]] for row in rows]
        table = prompt_table(prompts, answers, tokenizer, seq_len)
        return replace(table, class_tokens=torch.tensor(candidates.tokens))
    words = _words_of_rows(rows, candidates, tokenizer)
    room = [seq_len - len(tokenizer.prefix) - max(map(len, each)) for each in words]
    if rows and min(room) < 1:
        longest = max(len(word) for each in words for word in each)
        raise UserError(
            f"--seq-len {seq_len}", f"leaves no room beside a label of {longest} tokens", "use a larger one"
        )
    table = prompt_table(
        [prompt[-most:] for prompt, most, each in zip(prompts, room, words, strict=True) for _ in each],
        [list(word) for each in words for word in each],
        tokenizer,
        seq_len,
    )
    return replace(
        table,
        classes=torch.tensor([row.label for row in rows]),
        choices=candidates.count,
        cut=sum(len(prompt) > most for prompt, most in zip(prompts, room, strict=True)),
    )


def _words_of_rows(
    rows: Sequence[LabelledExample], candidates: Candidates, tokenizer: Tokenizer
) -> list[tuple[tuple[int, ...], ...]]:
    """The tokens of each class's word for each row. Raises `UserError` for a row with two that are alike."""
    if not candidates.texts:
        return [candidates.words] * len(rows)
    count = candidates.count
    encoded = [
        tuple(ids)
        for ids in tokenizer.encode([rendered(text, row) for row in rows for text in candidates.texts])
    ]
    found = [tuple(encoded[start : start + count]) for start in range(0, len(encoded), count)]
    for row, words in zip(rows, found, strict=True):
        if len(set(words)) < count or not all(words):
            raise UserError(
                f"--labels, {row.place}", "two words are the same to the model", "leave the row out"
            )
    return found


def mask_table(
    rows: Sequence[LabelledExample], template: str, tokenizer: Tokenizer, seq_len: int
) -> TokenTable:
    """A row's prompt between the model's special tokens, with the mask in it. What is too long loses what is
    farthest from the mask, of its longer side first. Raises `UserError` for a tokenizer without a mask."""
    if tokenizer.mask_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name}", "has no mask token", "use an encoder that was trained with masks"
        )
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    max_tokens = seq_len - special - 1
    if max_tokens < 1:
        raise UserError(
            f"--seq-len {seq_len}", "leaves no room for text beside the special tokens",
            f"use --seq-len {special + 2} or more",
        )  # fmt: skip
    head, _, tail = template.partition(MASK)
    befores = tokenizer.encode([rendered(head, row).rstrip(" ") for row in rows])
    afters = tokenizer.encode([rendered(tail, row) for row in rows])
    sequences, places, cut = [], [], 0
    for before, after in zip(befores, afters, strict=True):
        kept_before, kept_after = shares(len(before), len(after), max_tokens)
        start = [*tokenizer.prefix, *before[len(before) - kept_before :]]
        sequences.append([*start, tokenizer.mask_id, *after[:kept_after], *tokenizer.suffix])
        places.append(len(start))
        cut += kept_before < len(before) or kept_after < len(after)
    table = table_of(sequences, classes=[row.label for row in rows], cut=cut)
    return replace(table, masks=torch.tensor(places, dtype=torch.int64))
