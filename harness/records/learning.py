"""What a training run is told that is watched while it learns, and what it learned. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.metrics import is_better


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningLength:
    """How long it trains, by one of two measures, and how often it is evaluated on the way."""

    evaluations: int
    """At even distances, the last one at the end; one before the first step comes on top."""
    seconds: float | None = None
    """Of steps alone: set-up and evaluations are apart."""
    steps: int | None = None

    def is_over(self, step: int, train_s: float) -> bool:
        return self._share(step, train_s) >= 1.0

    def evaluations_due(self, step: int, train_s: float) -> int:
        """Of the evaluations on the way, how many belong to what was trained so far."""
        return min(self.evaluations, int(self._share(step, train_s) * self.evaluations + 1e-9))

    def _share(self, step: int, train_s: float) -> float:
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return train_s / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """What a run is to learn, and how that is judged."""

    length: LearningLength
    metric: str
    """By which the development data chooses among the evaluations."""
    classes: tuple[int, ...] = ()
    """What stands for the classes in an evaluation, where a language model classifies."""
    is_regression: bool = False
    is_bytes: bool = False
    """Tokens are bytes."""
    tests: bool = True
    """Evaluate on test data too."""
    rows_evaluated_together: int | None = None
    """Of an evaluation's batches; `None`: the batch size of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """One evaluation on development data."""

    step: int
    train_s: float
    """Of the steps until then."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningOutcome:
    """What a run learned; complete up to where it ended."""

    evaluations: tuple[Evaluated, ...] = ()
    """The first one before the first step."""
    test_before: dict[str, float] | None = None
    """Metrics on test data before the first step."""
    test: dict[str, float] | None = None
    """With the weights of the best evaluation on development data; `None`: there was none after a step, or no
    test was asked for."""
    steps: int = 0
    train_s: float = 0.0
    """Of the steps, without set-up and evaluations."""
    eval_s: float = 0.0

    def best(self, metric: str) -> Evaluated | None:
        """Of the evaluations after a step the first that no other is better than."""
        return best_of(self.evaluations, metric)


def best_of(evaluations: Sequence[Evaluated], metric: str) -> Evaluated | None:
    best: Evaluated | None = None
    for each in evaluations:
        if each.step and is_better(
            metric, each.metrics[metric], None if best is None else best.metrics[metric]
        ):
            best = each
    return best
