"""Settings of AdamW with moments of eight bits: which blocks are recomputed, whether moments are paged. No
torch."""

from __future__ import annotations

from engines.settings.given import GivenSettings
from engines.settings.libraries import AdamW8bitSettings
from profiles.planning.context import Choice, PlanningContext
from profiles.planning.recomputation import fewest_recomputed


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """`paged` only where the moments are what does not fit: what is paged travels in every step."""
    choice = fewest_recomputed(context, given)
    settings: AdamW8bitSettings = choice.settings.typed
    if "paged" in given or context.budget.gpu_bytes is None or context.why_missing(settings) is None:
        return choice
    paged = fewest_recomputed(context, given.completed(paged=True))
    if context.missing_bytes(paged.settings.typed) >= context.missing_bytes(settings):
        return choice
    return Choice(
        paged.settings, (*paged.reasons, "paged=true: moments that do not fit move to the host's memory")
    )
