"""Settings of LoRA: how many blocks are recomputed. No torch."""

from __future__ import annotations

from engines.settings.given import GivenSettings
from profiles.planning.context import Choice, PlanningContext, SettingChange
from profiles.planning.recomputation import fewest_recomputed

WAYS_OUT = (
    SettingChange(values={"r": 4}, quality="adapters of rank 4 learn less; what that costs was not studied"),
)


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """As few as fit: what is not computed twice takes less time."""
    return fewest_recomputed(context, given)
