"""What plans say of settings that they do not choose, as these cost something else: moments of fewer bits are
approximate; weights that stay on the GPU want room there. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from engines.settings.given import GivenSettings
from profiles.planning.context import NO_PRICE, Choice, PlanningContext, SettingChange
from profiles.units import format_seconds

CPU_BOUND = frozenset({"cpu", "host memory"})
"""What a step waits for where moments of fewer bytes help."""

WORTH_SAYING = 0.95
"""A step that takes more than this share of the one that is planned is not worth a word."""

STREAMED = "weights=streamed: without it the job "
"""How the reason begins that says what memory is missing for weights on the GPU."""


def faster_moments(context: PlanningContext, settings: Any, kinds: Sequence[str]) -> str | None:
    """A plan's sentence on the first of `kinds` that makes a step faster which waits for the CPU's update;
    `None`: it waits for something else. Those count that are more approximate than the moments of
    `settings`."""
    if context.machine.gpu is None:
        return None
    if settings.moments in kinds:
        kinds = kinds[kinds.index(settings.moments) + 1 :]
    now = context.predict(settings)
    if now.step_s is None or now.bottleneck not in CPU_BOUND:
        return None
    for kind in kinds:
        step_s = context.step_s(replace(settings, moments=kind))
        if step_s is not None and step_s <= WORTH_SAYING * now.step_s:
            return (
                f"not chosen unless set: moments={kind}, which is approximate, would make it "
                f"{format_seconds(step_s)} a step in place of {format_seconds(now.step_s)}"
            )
    return None


def with_price_of_streaming(
    context: PlanningContext,
    given: GivenSettings,
    streamed: Choice,
    resident: Callable[[PlanningContext, GivenSettings], Any],
    changes: Sequence[SettingChange],
) -> Choice:
    """`streamed`, where one of its reasons begins with `STREAMED`, with what a step would take if there were
    room, and the nearest change that makes room, where a step is faster so. `resident` chooses settings with
    all weights on the GPU, whether they fit or not; `changes` are the method's own that make room there."""
    at = next((n for n, reason in enumerate(streamed.reasons) if reason.startswith(STREAMED)), None)
    if at is None:
        return streamed
    before = context.step_s(streamed.settings.typed)
    least = context.step_s(resident(context, given))
    if context.why_missing(streamed.settings.typed) is not None or before is None or least is None:
        return streamed
    if least > WORTH_SAYING * before:
        return streamed
    reasons = list(streamed.reasons)
    reasons[at] += f"; streaming makes a step {format_seconds(before)} in place of {format_seconds(least)}"
    for other, changed, text, price in _nearest_changes(context, given, changes):
        settings = resident(other, changed)
        after = other.step_s(settings)
        if other.why_missing(settings) is None and after is not None and after <= WORTH_SAYING * before:
            reasons.append(
                f"not chosen unless set: with {text} the weights stay on the GPU, and a step takes "
                f"{format_seconds(after)}; price: {price}"
            )
            break
    return Choice(streamed.settings, tuple(reasons))


def _nearest_changes(
    context: PlanningContext, given: GivenSettings, changes: Sequence[SettingChange]
) -> Iterator[tuple[PlanningContext, GivenSettings, str, str]]:
    """Changes that leave more room on the GPU, what to type for each, and its price: first those with which a
    step computes the same, then those of the method."""
    work = context.workload
    for size in range(work.batch_size - 1, 0, -1):
        if work.batch_size % size == 0:
            count = work.accumulation * (work.batch_size // size)
            smaller = replace(context, workload=replace(work, batch_size=size, accumulation=count))
            flags = f"--batch-size {size} --accumulation {context.ranks * count}"
            yield smaller, given, flags, NO_PRICE
    for change in changes:
        if not any(key in given for key in change.values):
            flags = " ".join(f"{key}={str(value).lower()}" for key, value in change.values.items())
            yield context, given.completed(**change.values), flags, change.quality
