"""Loss and accuracy over held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.base import Batch, Evaluation
from engines.errors import UserError
from engines.kernels.token_scores import RunningScores, Scores
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import to_device, without_cache

IGNORED = -100
"""Label of a position, or a sequence, without one."""
SAME_LOSS = 1e-2
"""Relative: a model's own loss may be rounded to bf16."""


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


def losses_of_answers(output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(batch,) fp32: the mean of the losses of an answer's two ends. As in transformers one that lies behind
    the sequence has none."""
    found = torch.zeros(inputs["start_positions"].shape, device=output.start_logits.device)
    for end in ("start", "end"):
        logits = getattr(output, f"{end}_logits").float()
        length = logits.shape[1]
        places = inputs[f"{end}_positions"].clamp(0, length)
        found += functional.cross_entropy(logits, places, ignore_index=length, reduction="none") / 2
    return found


def losses_of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) fp32: of each of `labels` (n,), classes or numbers, with logits (n, classes) or (n, 1)."""
    if labels.is_floating_point():
        return (logits.squeeze(-1).float() - labels) ** 2
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def scores_of_tokens(logits: Tensor, labels: Tensor) -> Scores:
    """Of each of `labels` (batch, seq) int64 that is none of `IGNORED`, one after the other, by the logits
    (batch, seq, vocabulary) of the position before it. Reads them once."""
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    running = RunningScores(following.numel(), logits.device)
    running.add(slice(0, following.numel()), logits.reshape(-1, logits.shape[-1]), following, 0)
    scores, labelled = running.scores(), (following != IGNORED).nonzero().view(-1)
    return Scores(losses=scores.losses[labelled], predicted=scores.predicted[labelled])


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
        self._of_sequences: list[Tensor] = []
        """Of each batch (sequences, 2) fp64: the sum of a sequence's losses, and how many they are. They stay
        on the device until all are there."""

    def add(self, output: Any, inputs: Mapping[str, Tensor], class_tokens: Tensor | None = None) -> None:
        """What the model's own forward made of `inputs`, labels included."""
        if "start_positions" in inputs:
            expected, predicted = ends_of_answers(output, inputs)
            correct = (expected == predicted).all(1)
            self._add(float(output.loss) * len(expected), correct, expected, predicted)
            self._add_examples(losses_of_answers(output, inputs))
            return
        logits, labels = output.logits, inputs["labels"]
        if logits.dim() == 3:
            scores = scores_of_tokens(logits, labels)
            found = scores.predicted
            if class_tokens is not None:
                found = likeliest(logits[:, :-1], class_tokens)[labels[:, 1:] != IGNORED]
            # The mean loss over nothing is NaN, which a weight of zero does not take away.
            loss_sum = float(output.loss) * len(found) if len(found) else 0.0
            self.add_tokens(loss_sum, scores.losses, labels, found, class_tokens)
            return
        kept = labels != IGNORED
        labels, logits = labels[kept], logits[kept]
        if len(labels):
            correct = logits.argmax(-1) == labels
            predicted = logits.squeeze(-1).float() if labels.is_floating_point() else logits.argmax(-1)
            self._add(float(output.loss) * len(labels), correct, labels, predicted)
            self._add_examples(losses_of_classes(logits, labels))

    def add_tokens(
        self,
        loss_sum: float,
        losses: Tensor,
        labels: Tensor,
        predicted: Tensor,
        class_tokens: Tensor | None,
    ) -> None:
        """Of a causal language model: `labels` (batch, seq), and in the place of each that is none of
        `IGNORED`, one after the other, its loss, `losses` (n,), and what the model says, `predicted` (n,)."""
        following = labels[:, 1:]
        kept = following != IGNORED
        if len(predicted):
            self._one_each = self._one_each and bool((kept.sum(1) == 1).all())
            self._of_examples = self._of_examples and class_tokens is not None
            self._add(loss_sum, predicted == following[kept], following[kept], predicted)
            placed = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
            placed.masked_scatter_(kept, losses.double())
            self._of_sequences.append(torch.stack((placed.sum(1), kept.sum(1).double()), 1))

    def _add_examples(self, losses: Tensor) -> None:
        """Of sequences with one label each, (n,)."""
        self._of_sequences.append(torch.stack((losses.double(), torch.ones_like(losses.double())), 1))

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
        loss = self._loss / self._labels
        sequence_losses, sequence_labels = self._sequences(loss)
        return Evaluation(
            loss=loss,
            accuracy=self._correct / self._labels,
            num_labels=self._labels,
            num_examples=self._labels if self._of_examples else None,
            expected=tuple(self._expected) if self._one_each else (),
            predicted=tuple(self._predicted) if self._one_each else (),
            sequence_losses=sequence_losses,
            sequence_labels=sequence_labels,
        )

    def _sequences(self, loss: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Losses and labels of each sequence that has some; none where the model's own `loss` is not their
        mean, which is then something else than what was added up here."""
        rows = [row for row in torch.cat(self._of_sequences).tolist() if row[1]]
        losses, labels = tuple(row[0] for row in rows), tuple(int(row[1]) for row in rows)
        if not math.isclose(sum(losses) / self._labels, loss, rel_tol=SAME_LOSS, abs_tol=1e-4):
            return (), ()
        return losses, labels


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
