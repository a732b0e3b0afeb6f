"""Settings of torchao's offloading optimizer: whether gradients leave the GPU as they come. No torch."""

from __future__ import annotations

from dataclasses import replace

from engines.settings.first_order import TorchaoOffloadSettings
from engines.settings.given import GivenSettings
from profiles.planning.context import Choice, PlanningContext
from profiles.units import format_bytes


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """`offload_gradients` only where the job does not fit without: it costs time, and torchao does not
    accumulate with it. Where it does not fit either way, the setting of which less is missing."""
    settings: TorchaoOffloadSettings = given.typed
    kept, freed = (replace(settings, offload_gradients=each) for each in (False, True))
    if "offload_gradients" in given or context.why_missing(kept) is None:
        return Choice(given)
    if context.workload.accumulation > 1 or context.missing_bytes(freed) >= context.missing_bytes(kept):
        return Choice(given)
    saved_bytes = context.cost(kept).peak_gpu_bytes - context.cost(freed).peak_gpu_bytes
    return Choice(
        given.completed(offload_gradients=True),
        (f"offload_gradients=true: frees {format_bytes(saved_bytes)} of gradients, which do not fit",),
    )
