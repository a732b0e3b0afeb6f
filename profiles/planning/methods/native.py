"""How `native`'s blocks run: with several GPUs nothing is captured, nor is the loss computed in chunks. No
torch."""

from __future__ import annotations

from engines.settings.given import GivenSettings
from profiles.planning.context import Choice, PlanningContext
from profiles.planning.recomputation import fewest_recomputed


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """As few recomputed blocks as fit, of the settings that several GPUs leave open."""
    if context.ranks == 1:
        return fewest_recomputed(context, given)
    fixed = {name: value for name, value in (("graphs", False), ("loss_tokens", "all")) if name not in given}
    return fewest_recomputed(context, given.completed(**fixed))
