"""What the settings of all methods share: how a value is refused. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal

Schedule = Literal["constant", "linear", "cosine"]
Rounding = Literal["stochastic", "nearest"]


class Refused(ValueError):
    def __init__(self, told: str, remedy: str) -> None:
        super().__init__(told)
        self.remedy = remedy


def require(holds: bool, key: str, why: str, remedy: str = "") -> None:
    """`remedy` is what to do where it takes more than another value of the setting."""
    if not holds:
        raise Refused(f"{key} {why}", remedy)


def require_finite(settings: Any) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        require(not isinstance(value, float) or math.isfinite(value), field.name, "must be a finite number")
