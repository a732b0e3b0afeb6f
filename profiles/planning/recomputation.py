"""Which blocks are recomputed, for methods whose settings say how blocks run: as few as fit. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engines.settings.given import GivenSettings
from profiles.planning.budget import FREE_SHARE, why_missing
from profiles.planning.context import Choice, PlanningContext


def fewest_recomputed(context: PlanningContext, given: GivenSettings) -> Choice:
    """`checkpointed_blocks`, where --checkpointing allows any, and no compiler where there is no GPU."""
    if context.machine.gpu is None:
        chosen = {
            name: False for name in ("compile", "graphs") if name not in given and hasattr(given.typed, name)
        }
        return Choice(given.completed(**chosen))
    if "checkpointed_blocks" in given or not context.workload.checkpointing:
        return Choice(given)
    count = context.shape.num_blocks
    fewest = next((n for n in range(count + 1) if _fits(context, given, n)), None)
    if fewest is None:
        return Choice(given)
    if fewest == 0:
        reason = "all activations fit, so that nothing is computed twice"
    elif fewest == count:
        reason = "every block runs again in the backward pass; fewer do not fit"
    else:
        reason = f"the first {fewest} of {count} run again in the backward pass; fewer do not fit"
    return Choice(given.completed(checkpointed_blocks=fewest), (f"checkpointed_blocks={fewest}: {reason}",))


def _fits(context: PlanningContext, given: GivenSettings, recomputed: int) -> bool:
    """With room to spare where the user has named no limit, unless there is nothing left to recompute."""
    settings: Any = given.completed(checkpointed_blocks=recomputed).typed
    budget = context.budget
    if budget.gpu_bytes is not None and not budget.gpu_named and recomputed < context.shape.num_blocks:
        budget = replace(budget, gpu_bytes=int((1 - FREE_SHARE) * budget.gpu_bytes))
    return why_missing(context.cost(settings), budget) is None
