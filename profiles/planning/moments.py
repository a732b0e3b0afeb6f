"""What moments of fewer bits would gain: plans say that, and choose none, as they are approximate. Pure; no
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from profiles.planning.context import PlanningContext
from profiles.units import format_seconds

CPU_BOUND = frozenset({"cpu", "host memory"})
"""What a step waits for where moments of fewer bytes help."""

WORTH_SAYING = 0.95
"""A step that takes more than this share of the one with fp32 moments is not worth a word."""


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
