"""Words that stand for classes, where a language model classifies by what it would say next.

As the zeroth-order papers train on labelled rows (MeZO, arXiv 2305.17333, appendix E): a template ends where
the word belongs, and the loss is the cross-entropy over the candidates alone, not over the vocabulary. All
other logits are taken away behind the model's output layer, so that every method trains on it, whichever way
it goes through the model. Of words of several tokens the first token that tells them apart decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.errors import UserError
from harness.models.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    shared: tuple[int, ...]
    """Tokens that all words begin with; they belong to the prompt."""
    tokens: tuple[int, ...]
    """The token of each class, all different."""


def candidates_of(template: str, words: Sequence[str], tokenizer: Tokenizer) -> Candidates:
    """What stands for each class behind `template`: after a blank, unless the template ends in white space.

    Raises `UserError` where two words cannot be told apart by one token.
    """
    blank = "" if template[-1:].isspace() else " "
    encoded = tokenizer.encode([blank + word for word in words])
    same = 0
    while all(len(ids) > same + 1 and ids[same] == encoded[0][same] for ids in encoded):
        same += 1
    tokens = tuple(ids[same] for ids in encoded if len(ids) > same)
    if len(set(tokens)) < len(words):
        raise UserError(
            f"--labels {','.join(words)}", "not every word begins with a token of its own", "use other words"
        )
    return Candidates(shared=tuple(encoded[0][:same]), tokens=tokens)


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
