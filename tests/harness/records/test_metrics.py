"""Metrics of an evaluation, against their definitions."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines.base import Evaluation
from engines.errors import UserError
from engines.model.evaluation import EvaluationSum
from engines.shapes import Head
from harness.records import metrics
from harness.records.metrics import HIGHER_IS_BETTER, chosen_metric, metrics_of, metrics_of_task


def evaluation(expected: list[float], predicted: list[float], loss: float = 0.5) -> Evaluation:
    same = sum(one == other for one, other in zip(expected, predicted, strict=True))
    return Evaluation(
        loss=loss, accuracy=same / max(1, len(expected)), num_labels=len(expected),
        expected=tuple(expected), predicted=tuple(predicted),
    )  # fmt: skip


def test_the_majority_class_has_no_correlation() -> None:
    """CoLA on a model that says 'acceptable' to everything."""
    found = metrics_of(evaluation([1] * 7 + [0] * 3, [1] * 10), "classification")
    assert found["accuracy"] == found["majority_class"] == 0.7
    assert found["matthews"] == 0.0
    assert found["f1"] == pytest.approx(2 * 7 / (2 * 7 + 3))


def test_a_share_of_the_most_frequent_class_needs_classes() -> None:
    def of(expected: tuple[float, ...], examples: int | None) -> float | None:
        found = Evaluation(loss=1.0, accuracy=0.5, num_labels=4, num_examples=examples, expected=expected)
        return metrics.majority_class(found)

    assert of((1, 1, 0, 1), 4) == 0.75
    assert of((1.0, 1.0, 0.0, 1.0), 4) is None  # numbers to be predicted
    assert of((3, 5, 3, 5, 3, 5, 3, 5), 4) is None  # the two ends of answers
    assert of((1, 1, 0, 1), None) is None  # a token of a text each
    assert of((), 4) is None


def test_two_classes_by_their_definitions() -> None:
    rng = random.Random(0)
    expected = [float(rng.random() < 0.6) for _ in range(200)]
    predicted = [each if rng.random() < 0.8 else 1 - each for each in expected]
    pairs = list(zip(expected, predicted, strict=True))
    tp, tn, fp, fn = (pairs.count(kind) for kind in ((1, 1), (0, 0), (0, 1), (1, 0)))
    found = metrics_of(evaluation(expected, predicted), "classification")
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


@pytest.mark.parametrize(
    ("head", "labels", "candidates", "is_regression"),
    [
        ("classification", [1, 0, 1, 0], (), False),
        ("classification", [1.5, 0.5, 2.5, 0.1], (), True),
        ("question_answering", [1, 2, 3, 5], (), False),
        ("causal_lm", [7, 9, 7, 9], (), False),
        ("causal_lm", [7, 9, 7, 9], (7, 9), False),
        ("causal_lm", [], (), False),
        ("masked_lm", [7, 9, 7, 9], (7, 9), False),
    ],
)
def test_what_a_task_is_said_to_give_is_what_an_evaluation_gives(
    head: Head, labels: list[float], candidates: tuple[int, ...], is_regression: bool
) -> None:
    told = metrics_of_task(
        head, is_regression=is_regression, has_classes=bool(labels), by_words=bool(candidates)
    )
    given: set[str] = set()
    for is_bytes in (False, True):
        found = metrics_of(
            evaluation(labels, labels), head, candidates=candidates, is_regression=is_regression,
            is_bytes=is_bytes,
        )  # fmt: skip
        given |= found.keys() & HIGHER_IS_BETTER.keys()
    assert set(told) <= given <= {*told, "accuracy"}  # of a text's next tokens: no target


def test_candidates_stand_for_their_classes() -> None:
    """Tokens 90 and 17 are classes 0 and 1, whatever their order in the vocabulary."""
    found = metrics_of(evaluation([17, 17, 90, 17], [17, 90, 90, 17]), "causal_lm", candidates=(90, 17))
    assert found["f1"] == pytest.approx(0.8)
    assert found["majority_class"] == 0.75


def test_numbers_are_judged_by_correlation() -> None:
    x = np.random.default_rng(0).normal(size=50)
    y = np.exp(x)
    found = metrics_of(evaluation(list(x), list(y)), "classification", is_regression=True)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert "accuracy" not in found
    constant = metrics_of(evaluation(list(x), [1.0] * 50), "classification", is_regression=True)
    assert constant["pearson"] == constant["spearman"] == 0.0


def test_answers_overlap_by_their_tokens() -> None:
    """Right, half right, and elsewhere."""
    found = metrics_of(evaluation([3, 4, 3, 4, 3, 4], [3, 4, 4, 5, 8, 9]), "question_answering")
    assert found["answer_f1"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_perplexity_says_of_what() -> None:
    text = Evaluation(loss=1.0, accuracy=0.1, num_labels=5)
    assert metrics_of(text, "causal_lm")["perplexity_per_token"] == pytest.approx(math.e)
    assert metrics_of(text, "causal_lm", is_bytes=True)["perplexity_per_byte"] == pytest.approx(math.e)


def test_without_the_libraries_what_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_libraries", lambda: False)
    found = metrics_of(evaluation([0, 1], [0, 0]), "classification")
    assert found == {"loss": 0.5, "accuracy": 0.5, "majority_class": 0.5}
    with pytest.raises(UserError, match=r"scikit-learn and scipy; pip install 'lspzo-bench\[metrics\]'"):
        chosen_metric("matthews", found)


def test_an_evaluation_keeps_what_was_said_of_each_sequence() -> None:
    total = EvaluationSum()
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    total.add(SimpleNamespace(logits=logits, loss=torch.tensor(1.0)), {"labels": torch.tensor([1, 1])})
    assert (total.result().expected, total.result().predicted) == ((1, 1), (1, 0))
    tokens = torch.full((1, 4), -100)
    tokens[0, 1:] = 2
    output = SimpleNamespace(logits=torch.zeros(1, 4, 5), loss=torch.tensor(1.0))
    total.add(output, {"labels": tokens})
    assert total.result().predicted == ()
