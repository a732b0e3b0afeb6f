"""Loss and accuracy over held-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Evaluation
from engines.errors import UserError
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import to_device, without_cache

IGNORED = -100
"""Label of a position, or a sequence, without one."""


def likeliest(logits: Tensor, class_tokens: Tensor | None) -> Tensor:
    """(...) int64: the token or class with the largest of `logits` (..., vocabulary or classes), among
    `Batch.class_tokens` where there are some."""
    if class_tokens is None:
        return logits.argmax(-1)
    tokens = class_tokens.to(logits.device)
    return tokens[logits[..., tokens].argmax(-1)]


def ends_of_answers(output: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(expected, predicted), (batch, 2) int64 each: the answer's first and last token, and where the largest
    logits are."""
    expected = torch.stack((inputs["start_positions"], inputs["end_positions"]), 1)
    predicted = torch.stack((output.start_logits.argmax(-1), output.end_logits.argmax(-1)), 1)
    return expected, predicted


class EvaluationSum:
    """Adds up batches to an `Evaluation`; each batch weighs as many labels as it has."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct = 0
        self._labels = 0
        self._expected: list[float] = []
        self._predicted: list[float] = []
        self._one_each = True
        """Every sequence so far had one label, or one answer."""
        self._of_examples = True
        """Every label so far was a class, a number or an answer, none a token of a text."""

    def add(self, output: Any, inputs: Mapping[str, Tensor], class_tokens: Tensor | None = None) -> None:
        """What the model's own forward made of `inputs`, labels included."""
        if "start_positions" in inputs:
            expected, predicted = ends_of_answers(output, inputs)
            correct = (expected == predicted).all(1)
            self._add(float(output.loss) * len(expected), correct, expected, predicted)
            return
        logits, labels = output.logits, inputs["labels"]
        if logits.dim() == 3:
            found = likeliest(logits[:, :-1], class_tokens)[labels[:, 1:] != IGNORED]
            # The mean loss over nothing is NaN, which a weight of zero does not take away.
            loss_sum = float(output.loss) * len(found) if len(found) else 0.0
            self.add_tokens(loss_sum, labels, found, class_tokens)
            return
        kept = labels != IGNORED
        labels, logits = labels[kept], logits[kept]
        if len(labels):
            correct = logits.argmax(-1) == labels
            predicted = logits.squeeze(-1).float() if labels.is_floating_point() else logits.argmax(-1)
            self._add(float(output.loss) * len(labels), correct, labels, predicted)

    def add_tokens(
        self, loss_sum: float, labels: Tensor, predicted: Tensor, class_tokens: Tensor | None
    ) -> None:
        """Of a causal language model: `labels` (batch, seq), and in the place of each that is none of
        `IGNORED`, one after the other, what the model says, `predicted` (n,)."""
        following = labels[:, 1:]
        kept = following != IGNORED
        if len(predicted):
            self._one_each = self._one_each and bool((kept.sum(1) == 1).all())
            self._of_examples = self._of_examples and class_tokens is not None
            self._add(loss_sum, predicted == following[kept], following[kept], predicted)

    def _add(self, loss_sum: float, correct: Tensor, expected: Tensor, predicted: Tensor) -> None:
        self._loss += loss_sum
        self._correct += int(correct.sum())
        self._labels += len(correct)
        if self._one_each:  # else nobody asks for them, and a text has many
            self._expected += expected.flatten().tolist()
            self._predicted += predicted.flatten().tolist()

    def result(self) -> Evaluation:
        """Raises `UserError` if nothing was labelled."""
        if self._labels == 0:
            raise UserError("evaluation", "the data has no labelled position", "give a data set with labels")
        return Evaluation(
            loss=self._loss / self._labels,
            accuracy=self._correct / self._labels,
            num_labels=self._labels,
            num_examples=self._labels if self._of_examples else None,
            expected=tuple(self._expected) if self._one_each else (),
            predicted=tuple(self._predicted) if self._one_each else (),
        )


def evaluate_on_device(model: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> Evaluation:
    """Evaluation of a model whose weights are all on `device`. Restores the training mode."""
    was_training = model.training
    model.eval()
    arguments = without_cache(model)
    total = EvaluationSum()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = with_mask(to_device(batch, device))
                with known_padding(has_padding(batch.inputs)):
                    output = model(**inputs, **arguments)
                total.add(output, inputs, batch.class_tokens)
    finally:
        model.train(was_training)
    return total.result()
