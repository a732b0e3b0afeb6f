"""A language model as a classifier: its scores of the words that stand for the classes.

As the zeroth-order papers train on labelled rows (MeZO, arXiv 2305.17333, appendix E): the loss is the
cross-entropy over the words of the classes alone, not over the vocabulary. The model's own forward runs as
it is; behind it the scores of the words are taken from its logits, so that every method trains on them,
whichever way it goes through the model: its output has logits (batch, classes) and its batches labels
(batch,), as those of a model with a head for classes.

Two forms:
- `classify_at_mask`, a masked language model: the logits of the words at the position of the mask;
- `classify_by_words`, a causal language model: each example is one sequence for each class, with that class's
  word at its end, and its score is the mean log-likelihood of the word's tokens, of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

MASK_AT = "mask_positions"
"""Input of a masked model that classifies: (batch,) int64, where each sequence's mask is."""
WORDS = "word_tokens"
"""Input of a causal model that classifies: (batch x classes, seq) int64, the tokens of each word where they
are, -100 elsewhere. An example's sequences lie one after the other, in the order of the classes."""


def classify_at_mask(model: nn.Module, words: Sequence[int]) -> None:
    """Let `model`, a masked language model, score the token of each class at the mask."""
    tokens = list(words)

    def scores(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
        rows = torch.arange(logits.shape[0], device=logits.device)
        places = inputs.get(MASK_AT)
        return logits[rows, rows.new_zeros(()) if places is None else places][:, tokens]

    _replace_forward(model, MASK_AT, scores)


def classify_by_words(model: nn.Module, num_classes: int) -> None:
    """Let `model`, a causal language model, score the word of each class by the mean log-likelihood of its
    tokens."""

    def scores(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
        return mean_likelihoods(logits, inputs[WORDS]).view(-1, num_classes)

    _replace_forward(model, WORDS, scores)


def mean_likelihoods(logits: Tensor, words: Tensor) -> Tensor:
    """(rows,) fp32: of each row the mean log-likelihood of its `words` (rows, seq), -100 elsewhere.

    `logits` (rows, seq, vocabulary) predict the next position."""
    following, counted = words[:, 1:], words[:, 1:] != -100
    likelihoods = logits[:, :-1].float().log_softmax(-1)
    found = likelihoods.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (found * counted).sum(-1) / counted.sum(-1)


def classifies_by_words(model: nn.Module) -> bool:
    """Whether one of the above was done to `model`."""
    return hasattr(model, "classifies_by_words")


def _replace_forward(
    model: nn.Module, own_input: str, scores: Callable[[Tensor, dict[str, Any]], Tensor]
) -> None:
    """HAZARD: the model's own forward must not see the labels, or it would compute its own loss of them."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> SequenceClassifierOutput:
        inputs = {own_input: kwargs.pop(own_input, None)}
        found = scores(plain(*args, **kwargs).logits, inputs)
        loss = None if labels is None else nn.functional.cross_entropy(found.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=found)

    vars(model)["forward"] = forward
    vars(model)["classifies_by_words"] = True
