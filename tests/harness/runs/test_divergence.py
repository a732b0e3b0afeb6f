"""What a loss that is not finite, or does not move, is put down to."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Update
from harness.runs.divergence import Point, is_flat, why_flat, why_not_finite

NAN, INF = math.nan, math.inf


def history(
    losses: Sequence[float], gradients: Sequence[float] | None = None, rate: float = 1e-6
) -> list[Point]:
    return [
        Point(
            loss=loss,
            updates=()
            if gradients is None
            else (
                Update(step=step, learning_rate=rate, projected_gradient=gradients[step], weight_decay=0.0),
            ),
        )
        for step, loss in enumerate(losses)
    ]


def noisy(start: float, slope: float = 0.0, steps: int = 30, noise: float = 0.2) -> list[float]:
    draw = random.Random(0)
    return [start + slope * step + draw.gauss(0, noise) for step in range(steps)]


@pytest.mark.parametrize(
    ("losses", "dtype", "sides", "cause", "remedy"),
    [
        (
            [],
            "fp32",
            None,
            "no update was made yet, so it is the weights or the data$",
            "check the model and its data",
        ),
        ([], "fp32", (NAN, NAN), "or eps is far too large$", "check the model"),
        ([], "fp16", None, "or fp16 overflows$", "--dtype bf16"),
        ([], "fp16", (2.0, INF), "only one of the two perturbed losses is finite", r"--set zo2\.eps="),
        ([2.0, 2.1], "bf16", (NAN, 3.0), "eps is likely too large", r"--set zo2\.eps="),
        ([2.0, 2.1], "bf16", (NAN, INF), "came at once, after 2 updates", "--find-lr"),
        ([2.0, 1.9, 2.5, 9.0], "fp16", None, "had risen from 1.9 to 9, so the learning rate", "--find-lr"),
        ([2.0, 1.9, 1.8], "fp16", None, "fp16 has likely overflowed", "--dtype bf16"),
        ([2.0], "fp32", None, "after the first update, so a step was likely far too large", "--find-lr"),
    ],
)
def test_a_loss_that_is_not_finite_has_a_likely_cause(
    losses: list[float], dtype: Any, sides: tuple[float, float] | None, cause: str, remedy: str
) -> None:
    why = why_not_finite(history(losses), "zo2", dtype, sides)
    assert re.search(cause, why.cause), why
    assert re.search(remedy, why.remedy), why
    assert "\n" not in str(why)


def test_two_perturbed_losses_that_are_the_same_number() -> None:
    why = why_flat(history([6.0] * 4, [0.0] * 4), "mezo", "bf16")
    assert why is not None
    assert "exactly 0 in 4 steps in a row" in why.cause
    assert "eps is too small for bf16, or no position has a label" in why.cause
    assert "--set mezo.eps=" in why.remedy
    assert why_flat(history([6.0] * 4, [0.0, 1.0, 0.0, 0.0]), "mezo", "bf16") is None


def test_weights_that_were_blown_up_are_not_put_down_to_eps() -> None:
    why = why_flat(history([6.0, 4e7, 5.8, 5.8, 5.8], [3.0, 1e5, 0.0, 0.0, 0.0]), "mezo", "fp32")
    assert why is not None
    assert "learning rate is too large" in why.cause


def test_updates_too_small_to_show_tell_how_many_steps_would() -> None:
    """30 updates of 1e-6 x 10^2 could lower the loss by 3e-3; a tenth of 6 is 200 times that."""
    losses = noisy(6.0)
    why = why_flat(history(losses, [10.0] * 30), "zo2", "fp32")
    assert why is not None
    assert "could lower it by 0.003 at most" in why.cause
    needed = 30 * 0.1 * losses[0] / 3e-3
    told = int(why.remedy.split("about ")[1].split()[0])
    assert told == pytest.approx(needed, rel=0.05)


def test_hopeless_numbers_of_steps_are_not_told() -> None:
    for gradient in (1e-6, 1e-160, 1e-161):
        why = why_flat(history(noisy(6.0), [gradient] * 30), "zo2", "fp32")
        assert why is not None
        assert "--steps" not in why.remedy


def test_updates_that_were_large_enough_are_not_called_small() -> None:
    why = why_flat(history(noisy(6.0), [100.0] * 30, rate=1e-3), "zo2", "fp32")
    assert why is not None
    assert "large enough to lower it" in why.cause


def test_a_learning_rate_of_zero_is_named() -> None:
    why = why_flat(history(noisy(6.0), [10.0] * 30, rate=0.0), "zo2", "fp32")
    assert why is not None
    assert "the learning rate is 0" in why.cause


def test_a_method_with_gradients_has_no_estimate() -> None:
    why = why_flat(history(noisy(6.0)), "native", "bf16")
    assert why is not None
    assert "the learning rate is too small, or the steps are too few" in why.cause


@pytest.mark.parametrize("slope", [-0.1, 0.1])
def test_a_loss_that_moves_is_not_flat(slope: float) -> None:
    assert not is_flat(noisy(6.0, slope))
    assert why_flat(history(noisy(6.0, slope), [10.0] * 30), "zo2", "fp32") is None


def test_few_steps_are_not_judged() -> None:
    assert why_flat(history([6.0] * 9), "native", "bf16") is None
    assert why_flat([], "native", "bf16") is None
    assert why_flat(history([6.0] * 10), "native", "bf16") is not None


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), max_size=40), st.floats(0, 1.0))
@settings(deadline=None)
def test_every_history_gets_one_line_or_none(points: list[tuple[float, float]], rate: float) -> None:
    run = history([loss for loss, _ in points], [gradient for _, gradient in points], rate)
    for why in (why_flat(run, "zo2", "bf16"), why_not_finite(run, "zo2", "bf16", None)):
        assert why is None or "\n" not in str(why)
