"""Learning rates by step. Pure."""

from __future__ import annotations

import math

from engines.settings.first_order import AdamWSettings
from engines.settings.zeroth_order import MezoSettings


def learning_rate_at(step: int, settings: AdamWSettings | MezoSettings, total_steps: int) -> float:
    """The learning rate of `step` (counted from 0): linear warm-up, then constant, linear or cosine to 0."""
    peak = settings.learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    remaining = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / remaining)
    if settings.schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant_from(settings: AdamWSettings) -> int | None:
    """The step (counted from 0) from which the rate stays what it is; `None`: it changes to the end."""
    return settings.warmup_steps if settings.schedule == "constant" else None
