"""Why a loss is not finite, or does not move: the likely cause and what to do. Pure; imports no torch.

The rules look at what every run tells: losses, and for zeroth-order methods the updates. They name the
likeliest cause, not a proven one.

The descent that updates could have brought is estimated to first order. A step of MeZO moves the weights
by -lr g z, and g is the slope of the loss along z, so the loss of that batch changes by -lr g^2 (Malladi et
al., arXiv 2305.17333, definition 1, before the expectation is taken). Curvature only makes it less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engines.base import Update
from engines.shapes import Dtype

RISING = 1.2
"""A last loss this many times the lowest was rising: batches alone seldom differ by so much."""
ZEROS = 3
"""So many projected gradients of exactly 0 in a row are no chance."""
FEWEST_STEPS = 10
"""Fewer are not judged flat."""
NOTICEABLE = 0.01
"""A fall of the loss by this part is one that a person would see."""
HOPELESS_STEPS = 1e8
"""So many are not worth telling."""
WORTHWHILE = 0.1
"""The fall whose number of steps is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One step as the rules see it."""

    loss: float
    updates: tuple[Update, ...] = ()
    """Zeroth-order methods only: one for each query."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDiagnosis:
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


def why_not_finite(
    history: Sequence[Point], engine: str, dtype: Dtype, sides: tuple[float, float] | None
) -> LossDiagnosis:
    """Why the loss after `history` was NaN or infinite; `sides` are the two perturbed losses, if known."""
    if sides is not None and math.isfinite(sides[0]) != math.isfinite(sides[1]):
        return LossDiagnosis(
            cause="only one of the two perturbed losses is finite, so eps is likely too large",
            remedy=f"lower it with --set {engine}.eps=",
        )
    if not history:
        cause = "no update was made yet, so it is the weights or the data"
        cause += "" if sides is None else ", or eps is far too large"
        if dtype == "fp16":
            return LossDiagnosis(cause=f"{cause}, or fp16 overflows", remedy="try --dtype bf16")
        return LossDiagnosis(cause=cause, remedy="check the model and its data")
    losses = [point.loss for point in history]
    if losses[-1] > RISING * min(losses):
        return LossDiagnosis(
            cause=f"the loss had risen from {min(losses):.4g} to {losses[-1]:.4g}, so the learning rate is "
            "likely too large",
            remedy="find one with --find-lr, or lower learning_rate with --set",
        )
    if dtype == "fp16":
        return LossDiagnosis(
            cause="the loss had not risen before, so fp16 has likely overflowed", remedy="try --dtype bf16"
        )
    steps = "the first update" if len(history) == 1 else f"{len(history)} updates"
    return LossDiagnosis(
        cause=f"it came at once, after {steps}, so a step was likely far too large",
        remedy="find one with --find-lr, or lower learning_rate with --set",
    )


def why_flat(history: Sequence[Point], engine: str, dtype: Dtype) -> LossDiagnosis | None:
    """Why the loss did not move in a run of these steps; `None` if it moved, or if nothing can be said."""
    updates = [update for point in history for update in point.updates]
    flags = [update.projected_gradient == 0.0 for update in updates]
    zeros = _longest_run(flags)
    highest = max((point.loss for point in history), default=0.0)
    if zeros >= ZEROS and not all(flags) and highest > RISING * history[0].loss:
        return LossDiagnosis(
            cause=f"the loss rose to {highest:.4g}, and then the projected gradient was exactly 0 in {zeros} "
            "steps in a row: the learning rate is too large, and the model broke",
            remedy="find a learning rate with --find-lr, or lower learning_rate with --set",
        )
    if zeros >= ZEROS:
        return LossDiagnosis(
            cause=f"the projected gradient was exactly 0 in {zeros} steps in a row: both perturbed losses "
            f"are the same number, so eps is too small for {dtype}, or no position has a label",
            remedy=f"raise eps with --set {engine}.eps=, and check the labels",
        )
    losses = [point.loss for point in history]
    if not is_flat(losses):
        return None
    first, steps = losses[0], len(history)
    before, after = (statistics.fmean(third) for third in _outer_thirds(losses))
    cause = (
        f"the loss stayed flat over {steps} steps (a mean of {before:.4g} in the first third and of "
        f"{after:.4g} in the last, which its scatter may be)"
    )
    descent = sum(u.learning_rate * u.projected_gradient**2 / u.queries for u in updates)
    if not updates:
        return LossDiagnosis(
            cause=f"{cause}: the learning rate is too small, or the steps are too few",
            remedy="find a learning rate with --find-lr, or give more --steps",
        )
    if not any(update.learning_rate for update in updates):
        return LossDiagnosis(
            cause=f"{cause}: the learning rate is 0", remedy="raise learning_rate with --set"
        )
    if descent >= NOTICEABLE * abs(first):
        return LossDiagnosis(
            cause=f"{cause}, although the updates were large enough to lower it: the learning rate is too "
            "large, or the noise of the batches hides the fall",
            remedy="find a learning rate with --find-lr, or look at a held-out loss with --eval-batches",
        )
    needed = steps * WORTHWHILE * abs(first) / descent if descent else math.inf
    more = f", or give about {_rounded(needed)} --steps for a fall of {WORTHWHILE:.0%}"
    return LossDiagnosis(
        cause=f"{cause}: all updates together could lower it by {descent:.2g} at most, so the learning rate "
        "is too small or the steps are too few",
        remedy="find a learning rate with --find-lr" + (more if needed < HOPELESS_STEPS else ""),
    )


def is_flat(losses: Sequence[float]) -> bool:
    """Whether the last third's mean is the first third's, within two standard errors or half a percent.

    The standard error is that of the scatter inside the thirds. Too few steps are not flat.
    """
    if len(losses) < FEWEST_STEPS or not all(math.isfinite(loss) for loss in losses):
        return False
    first, last = _outer_thirds(losses)
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / len(first))
    return abs(after - before) <= max(2 * error, 0.005 * abs(before))


def _outer_thirds(losses: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    third = len(losses) // 3
    return losses[:third], losses[-third:]


def _longest_run(flags: Sequence[bool]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


def _rounded(count: float) -> str:
    """Two digits are all that the estimate is good for."""
    return f"{float(f'{count:.1e}'):.0f}"
