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


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """(correct, labelled): positions where the largest logit is the label.

    `logits` (batch, seq, vocabulary) predict the next position's label; (batch, classes) their own.
    """
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    correct = (logits.argmax(-1) == labels) & kept
    return int(correct.sum()), int(kept.sum())


def count_answers(start_logits: Tensor, end_logits: Tensor, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """(correct, sequences): those where the largest logits (batch, seq) are at both ends of the answer."""
    starts = start_logits.argmax(-1) == inputs["start_positions"]
    ends = end_logits.argmax(-1) == inputs["end_positions"]
    return int((starts & ends).sum()), starts.numel()


def judged(output: Any, inputs: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """`Evaluation.expected` and `predicted` of one batch; empty where sequences have several labels."""
    if "start_positions" in inputs:
        expected = torch.stack((inputs["start_positions"], inputs["end_positions"]), 1)
        predicted = torch.stack((output.start_logits.argmax(-1), output.end_logits.argmax(-1)), 1)
        return expected.flatten().tolist(), predicted.flatten().tolist()
    logits, labels = output.logits, inputs["labels"]
    if logits.dim() == 2:
        found = logits.squeeze(-1).float() if labels.is_floating_point() else logits.argmax(-1)
        return labels.flatten().tolist(), found.flatten().tolist()
    kept = labels[:, 1:] != -100
    if not bool((kept.sum(1) == 1).all()):
        return [], []
    return labels[:, 1:][kept].tolist(), logits[:, :-1][kept].argmax(-1).tolist()


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

    def add(self, output: Any, inputs: Mapping[str, Tensor]) -> None:
        """What the model's own forward made of `inputs`, labels included."""
        if "start_positions" in inputs:
            correct, labelled = count_answers(output.start_logits, output.end_logits, inputs)
        else:
            correct, labelled = count_correct(output.logits, inputs["labels"])
        if labelled > 0:  # the mean loss over nothing is NaN, which a weight of zero does not take away
            self.add_sums(float(output.loss) * labelled, correct, labelled)
            expected, predicted = judged(output, inputs)
            self._one_each = self._one_each and bool(expected)
            self._expected += expected
            self._predicted += predicted

    def add_sums(self, loss_sum: float, correct: int, labelled: int) -> None:
        self._loss += loss_sum
        self._correct += correct
        self._labels += labelled

    def result(self) -> Evaluation:
        """Raises `UserError` if nothing was labelled."""
        if self._labels == 0:
            raise UserError("evaluation", "the data has no labelled position", "give a data set with labels")
        return Evaluation(
            loss=self._loss / self._labels,
            accuracy=self._correct / self._labels,
            num_labels=self._labels,
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
                total.add(output, inputs)
    finally:
        model.train(was_training)
    return total.result()
