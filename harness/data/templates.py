"""Labelled rows as prompts: a template with the row's texts in it, and a place for the word of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import Formatter

import torch

from engines.errors import UserError
from engines.shapes import Head
from harness.data.records import LabelledExample
from harness.data.token_tables import TokenTable, prompt_table, shares, table_of
from harness.models.candidates import MASK, Candidates
from harness.models.tokenizers import Tokenizer

FIELDS = ("text", "text2", "mask")


def check_template(template: str, head: Head, *, is_paired: bool) -> None:
    """Raises `UserError` for a template that does not say where the row's texts belong, or the mask."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError("--template", f"{error}", "write {{ for a brace") from None
    unknown = [name for name in named if name not in FIELDS]
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
    return template.replace("\\n", "\n").format(text=row.text, text2=row.second or "", mask="")


def template_table(
    rows: Sequence[LabelledExample],
    template: str,
    candidates: Candidates,
    tokenizer: Tokenizer,
    seq_len: int,
) -> TokenTable:
    """A row's prompt without loss, then the word of its class with it, if that is one token; else the prompt
    once for each class, with its word. Long prompts lose their beginning, as many tokens for every class."""
    prompts = tokenizer.encode([rendered(template, row) for row in rows])
    if candidates.of_one_token:
        answers = [[candidates.tokens[row.label]] for row in rows]
        return prompt_table(prompts, answers, tokenizer, seq_len)
    longest, classes = max(len(word) for word in candidates.words), len(candidates.words)
    max_tokens = seq_len - len(tokenizer.prefix) - longest
    if max_tokens < 1:
        raise UserError(
            f"--seq-len {seq_len}", f"leaves no room beside a label of {longest} tokens", "use a larger one"
        )
    table = prompt_table(
        [prompt[-max_tokens:] for prompt in prompts for _ in range(classes)],
        [list(word) for _ in rows for word in candidates.words],
        tokenizer,
        seq_len,
    )
    return replace(
        table,
        classes=torch.tensor([row.label for row in rows]),
        choices=classes,
        cut=sum(len(prompt) > max_tokens for prompt in prompts),
    )


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
