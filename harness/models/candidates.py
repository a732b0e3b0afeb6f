"""Words that stand for classes, where a language model classifies by what it would say.

As the zeroth-order papers train on labelled rows (MeZO, arXiv 2305.17333, appendix E): a template has a place
for the word, and the loss is the cross-entropy over the words of the classes alone, not over the vocabulary.

Where every word is one token, a causal model needs one sequence for each example: all other logits are
taken away behind its output layer. Words of several tokens are counted by all of them
(`engines.model.label_words`), with one sequence for each class, and so are those that name a column in
braces, of which each row has its own. A masked model fills in one token, so its words are of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.errors import UserError
from engines.model.label_words import classify_at_mask, classify_by_words
from engines.shapes import Head
from harness.models.tokenizers import Tokenizer

MASK = "{mask}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    words: tuple[tuple[int, ...], ...] = ()
    """The tokens of each class's word, no two alike; empty where each row has words of its own."""
    texts: tuple[str, ...] = ()
    """What those are made of, such as ` {choice1}`, one for each class; empty: words are the same for all."""

    @property
    def count(self) -> int:
        """Of the classes."""
        return len(self.texts or self.words)

    @property
    def of_one_token(self) -> bool:
        return not self.texts and all(len(word) == 1 for word in self.words)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token of each class, where every word is one token."""
        return tuple(token for (token,) in self.words)

    def labels(self, head: Head) -> tuple[int, ...]:
        """What the classes are in an evaluation, in their order: their tokens, where a decoder says each by
        one, else their numbers."""
        return self.tokens if head == "causal_lm" and self.of_one_token else tuple(range(self.count))


def candidates_of(template: str, words: Sequence[str], tokenizer: Tokenizer, head: Head) -> Candidates:
    """What stands for each class in `template`: after a blank, unless white space or a word stands before it.

    Raises `UserError` where two words are alike to the model, and where a masked model is given one of
    several tokens.
    """
    before = template.partition(MASK)[0] if head == "masked_lm" else template
    # Nobody writes a blank where the answer of a decoder belongs; in the middle of a text they do.
    blank = (" " if before[-1:] in ("", " ") else "") if head == "masked_lm" else _blank(before)
    if any("{" in word for word in words):
        if head == "masked_lm":
            raise UserError(
                f"--labels {','.join(words)}", "are texts of each row, and a mask stands for one token",
                "use a decoder, or words that are the same for all rows",
            )  # fmt: skip
        return Candidates(texts=tuple(blank + word for word in words))
    encoded = [tuple(ids) for ids in tokenizer.encode([blank + word for word in words])]
    named = f"--labels {','.join(words)}"
    if len(set(encoded)) < len(words) or not all(encoded):
        raise UserError(named, "two words are the same to the model, or one is nothing", "use other words")
    if head == "masked_lm":
        several = [(word, ids) for word, ids in zip(words, encoded, strict=True) if len(ids) > 1]
        if several:
            word, ids = several[0]
            raise UserError(
                named, f"'{word}' is {len(ids)} tokens, and a mask stands for one", "use words of one token"
            )
    return Candidates(words=tuple(encoded))


def _blank(before: str) -> str:
    return "" if before[-1:].isspace() else " "


def let_classify(model: Any, candidates: Candidates, head: Head) -> None:
    """Let `model`, a language model with its own forward, say which class it would name.

    Raises `UserError` for a model that cannot be made to.
    """
    if head == "masked_lm":
        classify_at_mask(model, candidates.tokens)
    elif candidates.of_one_token:
        restrict_logits(model, candidates.tokens)
    else:
        classify_by_words(model, candidates.count)


def restrict_logits(model: Any, tokens: Sequence[int]) -> None:
    """Let `model` hand out minus infinity for every token but these, and so its loss be over them alone.

    Raises `UserError` for a model that computes on with its logits before the loss.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(model.config, "final_logit_softcapping", None) is not None:
        raise UserError(
            "--template", "this model's logits cannot be restricted to the labels", "use another decoder"
        )
    left_out = torch.ones(head.weight.shape[0], dtype=torch.bool)
    left_out[list(tokens)] = False
    head.register_buffer("left_out", left_out, persistent=False)

    def restrict(module: Any, _: object, logits: Tensor) -> Tensor:
        return logits.masked_fill(module.left_out, -math.inf)

    head.register_forward_hook(restrict)
