"""What an evaluation says, in the numbers that a task is judged by.

Classes: accuracy beside the share of the most frequent class, F1 (of class 1 where there are two, else the
mean over classes) and Matthews' correlation. Numbers: Pearson's and Spearman's correlation. Answers in a
text: exact match, and F1 over the tokens of the two spans. Language modelling: perplexity, by token or by
byte as the name says. scikit-learn and scipy compute what is not a mean; they are an extra.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from engines.base import Evaluation
from engines.errors import UserError
from engines.shapes import Head

INSTALL = "pip install 'lspzo-bench[metrics]'"
HIGHER_IS_BETTER: Mapping[str, bool] = {
    "loss": False,
    "accuracy": True,
    "f1": True,
    "matthews": True,
    "pearson": True,
    "spearman": True,
    "exact_match": True,
    "answer_f1": True,
    "perplexity_per_token": False,
    "perplexity_per_byte": False,
}
"""Metrics that a checkpoint can be chosen by."""

OF_LIBRARIES = ("f1", "matthews", "pearson", "spearman")
"""Those that scikit-learn and scipy compute."""


def has_libraries() -> bool:
    """Whether scikit-learn and scipy are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("sklearn", "scipy"))


def metrics_of_task(head: Head, *, is_regression: bool, has_classes: bool, by_words: bool) -> tuple[str, ...]:
    """Of those, what `metrics_of` gives where the libraries are installed. `has_classes`: each example has a
    label; `by_words`: a model that predicts tokens names it among the words of all classes."""
    if is_regression:
        return ("pearson", "spearman", "loss")
    if head == "question_answering":
        return ("exact_match", "answer_f1", "loss")
    if head == "causal_lm" and not by_words:
        of_text = ("perplexity_per_token", "perplexity_per_byte", "loss")
        return ("accuracy", "loss") if has_classes else of_text
    return ("accuracy", "f1", "matthews", "loss")


def metrics_of(
    evaluation: Evaluation,
    head: Head,
    *,
    candidates: Sequence[int] = (),
    is_regression: bool = False,
    is_bytes: bool = False,
) -> dict[str, float]:
    """Metric -> value, `loss` first. Without the libraries those that need them are missing.

    `candidates` are what stands for the classes in the evaluation, in their order, where a language model
    classifies: their tokens, or their numbers.
    """
    found = {"loss": evaluation.loss}
    if is_regression:
        return found | _correlations(evaluation)
    if head == "question_answering":
        return found | _answers(evaluation)
    found["accuracy"] = evaluation.accuracy
    if head == "causal_lm" and not candidates:
        if evaluation.expected:  # one labelled token each: a class by its word
            return found | _majority(evaluation.expected)
        unit = "byte" if is_bytes else "token"
        return found | {f"perplexity_per_{unit}": math.exp(min(evaluation.loss, 700.0))}
    class_of = {token: index for index, token in enumerate(candidates)}
    expected = [class_of.get(int(each), int(each)) for each in evaluation.expected]
    predicted = [class_of.get(int(each), int(each)) for each in evaluation.predicted]
    return found | _majority(expected) | _classes(expected, predicted)


def share_right(evaluation: Evaluation) -> float | None:
    """Its accuracy; `None` where numbers are predicted, of which none is right or wrong."""
    return None if _are_numbers(evaluation) else evaluation.accuracy


def _are_numbers(evaluation: Evaluation) -> bool:
    return any(isinstance(each, float) for each in evaluation.expected)


def majority_class(evaluation: Evaluation) -> float | None:
    """Share of the examples that are of the most frequent class; `None` where they have no classes, or not
    each its own."""
    expected = evaluation.expected
    if len(expected) != evaluation.num_examples or _are_numbers(evaluation):
        return None  # texts, and answers with two ends; numbers
    return _majority(expected).get("majority_class")


def chosen_metric(name: str, known: Mapping[str, float]) -> str:
    """The metric that a checkpoint is kept by: `name`, or the task's own where that is empty.

    Raises `UserError` if the evaluation does not give it.
    """
    if not name:
        own = ("accuracy", "exact_match", "pearson")
        is_text = any(each.startswith("perplexity") for each in known)
        return "loss" if is_text else next((each for each in own if each in known), "loss")
    if name not in known or name not in HIGHER_IS_BETTER:
        usable = ", ".join(each for each in known if each in HIGHER_IS_BETTER)
        missing = name in HIGHER_IS_BETTER and not has_libraries()
        raise UserError(
            f"--best-by {name}",
            "needs scikit-learn and scipy" if missing else "this task has no such metric",
            INSTALL if missing else f"choose from: {usable}",
        )
    return name


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether `value` beats `than`; not if it is no number."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value > than if HIGHER_IS_BETTER[metric] else value < than


def metrics_text(metrics: Mapping[str, float]) -> str:
    """The metrics in one line for a person."""
    shares = {"accuracy", "majority_class", "f1", "exact_match", "answer_f1"}
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.1%}" if name in shares else f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in metrics.items()
    )


def _majority(expected: Sequence[float]) -> dict[str, float]:
    if not expected:
        return {}
    return {"majority_class": Counter(expected).most_common(1)[0][1] / len(expected)}


def _classes(expected: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    if not expected or not has_libraries():
        return {}
    from sklearn.metrics import f1_score, matthews_corrcoef

    labels = sorted({*expected, *predicted})
    two = set(labels) <= {0, 1}
    f1 = (
        f1_score(expected, predicted, pos_label=1, zero_division=0.0)
        if two
        else f1_score(expected, predicted, average="macro", labels=labels, zero_division=0.0)
    )
    return {"f1": float(f1), "matthews": float(matthews_corrcoef(expected, predicted))}


def _correlations(evaluation: Evaluation) -> dict[str, float]:
    if len(evaluation.expected) < 2 or not has_libraries():
        return {}
    if min(len(set(evaluation.expected)), len(set(evaluation.predicted))) < 2:
        return {"pearson": 0.0, "spearman": 0.0}  # of a constant: not defined, and nothing was learnt
    from scipy.stats import pearsonr, spearmanr

    return {
        "pearson": float(pearsonr(evaluation.expected, evaluation.predicted).statistic),
        "spearman": float(spearmanr(evaluation.expected, evaluation.predicted).statistic),
    }


def _answers(evaluation: Evaluation) -> dict[str, float]:
    found = {"exact_match": evaluation.accuracy}
    if evaluation.expected:
        pairs = zip(_spans(evaluation.expected), _spans(evaluation.predicted), strict=True)
        scores = [_overlap(one, other) for one, other in pairs]
        found["answer_f1"] = sum(scores) / len(scores)
    return found


def _spans(ends: Sequence[float]) -> list[tuple[int, int]]:
    """First and last token of each, which lie one after the other."""
    return [(int(first), int(last)) for first, last in zip(ends[::2], ends[1::2], strict=True)]


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    """F1 of the tokens that two spans have in common."""
    common = min(one[1], other[1]) - max(one[0], other[0]) + 1
    lengths = (one[1] - one[0] + 1) + (other[1] - other[0] + 1)
    return 2 * common / lengths if common > 0 else 0.0
