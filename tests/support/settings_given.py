"""Settings as a job or a plan holds them, from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.settings.given import GivenSettings
from engines.settings.parse import settings_of_document


def given_settings(engine: str, values: Mapping[str, Any] | None = None, **more: Any) -> GivenSettings:
    return settings_of_document(engine, {**(values or {}), **more})


def given_for_each(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, GivenSettings]:
    """By engine."""
    return {engine: given_settings(engine, values) for engine, values in settings.items()}
