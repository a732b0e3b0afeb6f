"""What a check of a machine can say. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    name: str
    severity: Severity
    title: str
    evidence: str
    cause: str
    """Likely, not proven."""
    remedy: str


Answer = Finding | str | None
"""A finding, why there can be none, or `None`: in order."""

NO_GPU = "there is no GPU in the profile"
