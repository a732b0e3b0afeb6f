"""T*: tokens per step from which what `exact-offload` does on CPU and link hides behind the GPU. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace

from engines.settings.exact_offload import ExactOffloadSettings
from profiles.planning.context import BESIDE_GPU, PlanningContext
from profiles.units import format_seconds

MOST_TOKENS = 1 << 24
"""What does not hide with so many tokens a step never does."""


def hidden_above_tokens(context: PlanningContext, settings: ExactOffloadSettings) -> float | None:
    """Tokens per step from which CPU and link hide behind the GPU (T* in `engines.costs.exact_offload`), in
    one micro-batch of more and more sequences of the job's length: it belongs to machine and model, and what
    a step takes whatever its tokens is not taken for theirs, nor that blocks are updated by the GPU. `None`:
    there is no GPU, or the profile lacks a figure; infinite: they never do."""
    settings = replace(settings, gpu_blocks=0)
    if context.machine.gpu is None or _hides(context, settings) is None:
        return None

    def spare_s(sequences: int) -> float:
        """By how much the GPU takes longer than what is to hide behind it."""
        workload = replace(context.workload, batch_size=max(1, sequences), accumulation=1)
        gpu_s, others_s = _hides(replace(context, workload=workload), settings) or (0.0, 0.0)
        return gpu_s - others_s if sequences else -others_s

    most = MOST_TOKENS // context.workload.seq_len + 1
    sequences = bisect_left(range(most), True, key=lambda count: spare_s(count) >= 0)
    if sequences == most:
        return math.inf
    above, below = spare_s(sequences), spare_s(max(0, sequences - 1))
    beyond = above / (above - below) if above > below else 0.0
    return context.workload.seq_len * (sequences - beyond)


def _hides(context: PlanningContext, settings: ExactOffloadSettings) -> tuple[float, float] | None:
    """Seconds of a step for which the GPU hides what is beside it, and of what that is."""
    times = context.resource_s(settings)
    if times is None or not times["gpu"]:
        return None
    window = 1 / 3 if settings.waits_for_norm else 1.0  # the next forward pass alone
    return window * times["gpu"], max(times[name] for name in BESIDE_GPU)


def crossover_reason(context: PlanningContext, settings: ExactOffloadSettings) -> str | None:
    """From how many tokens a step what is slowest beside the GPU hides, for a plan; `None`: not known."""
    tokens, crossover = context.workload.tokens_per_step, hidden_above_tokens(context, settings)
    times = context.resource_s(replace(settings, gpu_blocks=0))
    if crossover is None or times is None:
        return None
    slowest = max(BESIDE_GPU, key=times.__getitem__)
    of_all = ", with all blocks updated by the CPU" if settings.gpu_blocks else ""
    beside = f"the slowest beside the GPU{of_all}, {slowest} ({format_seconds(times[slowest])}),"
    if crossover == math.inf:
        return f"{beside} hides behind it with no number of tokens per step"
    return f"{beside} hides behind it from {crossover:,.0f} tokens per step on; this job has {tokens:,}"


def clip_by(context: PlanningContext, settings: ExactOffloadSettings) -> tuple[str, str]:
    """By whose norm a plan clips, and why: by its own where waiting for it hides."""
    exact = replace(settings, clip_by="exact")
    crossover, times = hidden_above_tokens(context, exact), _hides(context, exact)
    fits = (
        context.why_missing(exact) is None
        or context.why_missing(replace(exact, clip_by="previous")) is not None
    )
    if crossover is None or times is None or (fits and times[0] >= times[1]):
        return "exact", "clip_by=exact: gradients are clipped by their own norm; to wait for it hides"
    until = "never hides" if crossover == math.inf else f"hides from {crossover:,.0f} tokens per step"
    return "previous", (
        "clip_by=previous: gradients are clipped by the norm of the step before, a method of its own; to "
        f"wait for their own {until}"
    )
