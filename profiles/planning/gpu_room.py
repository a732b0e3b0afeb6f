"""What `exact-offload` uses GPU memory for that is left: blocks that the GPU updates, activations that are
kept, room for streamed blocks. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace

from engines.settings.exact_offload import GRADIENT_SLOTS, ExactOffloadSettings
from engines.settings.given import GivenSettings
from profiles.planning.budget import gpu_bytes_needed
from profiles.planning.context import AS_FAST, PlanningContext
from profiles.units import format_seconds

NO_SLOWER = 1.003
"""A step within this factor of the fastest is not worth a block's activations. Of 32 blocks one that runs
again takes 0.008 of a step that the GPU decides; where the CPU plainly does, the last takes 0.001, for which
the CPU waits, and the others nothing."""

WORTH_GPU_BLOCKS = 1.005
"""A step within this factor of the fastest is not worth more blocks that the GPU updates, which take 12 bytes
of its memory for each of their parameters."""

SLOWER_UPDATES = 1.2
"""What updates took in runs, of what is predicted: 1.1 to 1.4 times, where the GPU took as long (6.7B, 16
thousand tokens a step). Blocks are left to the GPU by this, as its memory would else be idle."""

NEAR_FASTEST = 1.02
"""A step this near to the fastest does where that would need more copies, or more room on the GPU for
streamed blocks."""


def finished(
    context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings
) -> ExactOffloadSettings:
    """With what the memory that is left is used for."""
    settings, _ = with_gpu_blocks(context, given, settings, growth=1.0)
    if context.workload.checkpointing and "checkpointed_blocks" not in given:
        settings, _ = recomputed_for_room(context, given, settings, most=False)
    if settings.streams and "weight_slots" not in given:
        settings = replace(settings, weight_slots=weight_slots_for_room(context, settings))
    return settings


def with_gpu_blocks(
    context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings, *, growth: float = 0.25
) -> tuple[ExactOffloadSettings, list[str]]:
    """`settings` with as few blocks that the GPU updates as make a step nearly as fast as with any number for
    which there is room, what is recomputed for that room included, also where updates take
    `SLOWER_UPDATES`; and why."""
    usable, blocks, least = context.budget.fillable_gpu_bytes, context.shape.num_blocks, settings.gpu_blocks
    elsewhere = settings.streams or settings.disk_blocks > 0
    if usable is None or elsewhere or not may_leave_blocks_to_gpu(context, given, settings):
        return settings, []
    step_s: dict[int, float] = {}
    longest_s: dict[int, float] = {}
    more = (count for count in counts_to_try(most_gpu_blocks(context, settings), growth) if count > least)
    for count in (least, *more):
        tried = replace(settings, gpu_blocks=count)
        if context.workload.checkpointing and "checkpointed_blocks" not in given:
            tried, _ = recomputed_for_room(context, given, tried, most=False)
        if gpu_bytes_needed(context.cost(tried), context.budget) > usable and count > least:
            break
        step_s[count] = context.step_s(tried) or math.inf
        times = context.resource_s(tried) or {"cpu": 0.0, "host memory": 0.0}
        updates_s = SLOWER_UPDATES * max(times["cpu"], times["host memory"])
        longest_s[count] = max(step_s[count], updates_s)
    enough_s = WORTH_GPU_BLOCKS * min(longest_s.values())
    chosen = next(count for count, its_s in longest_s.items() if its_s <= enough_s)
    if chosen == least or enough_s == math.inf:
        return settings, []
    with_it, without_it = format_seconds(step_s[chosen]), format_seconds(step_s[least])
    fewer = (
        f"with {least}, the fewest with which the job fits, {without_it}"
        if least
        else f"without that {without_it}"
    )
    return replace(settings, gpu_blocks=chosen), [
        f"gpu_blocks={chosen}: masters and moments of {chosen} of {blocks} blocks, from the first on, have "
        f"room on the GPU, which updates them; a step takes {with_it}, {fewer}"
    ]


def may_leave_blocks_to_gpu(
    context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings
) -> bool:
    """The user has not said how many, and one process takes the step."""
    return "gpu_blocks" not in given and settings.offload and context.ranks == 1


def most_gpu_blocks(context: PlanningContext, settings: ExactOffloadSettings) -> int:
    """That may be tried."""
    most = context.shape.num_blocks - 1
    return min(most, GRADIENT_SLOTS) if settings.max_grad_norm > 0 else most  # clip_by is chosen later


def counts_to_try(most: int, growth: float = 0.25) -> list[int]:
    """Numbers of blocks up to `most`, each by that share more than the one before."""
    found = [0]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, int(growth * found[-1]))))
    return found


def recomputed_for_room(
    context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings, *, most: bool = True
) -> tuple[ExactOffloadSettings, list[str]]:
    """`settings` with as few blocks to run again in the backward pass as make the step faster, and whether
    the others keep all their activations or what their products give, where that is faster; and why. Without
    `most` with the fewest that fit, which is as fast and sooner found."""
    blocks = context.shape.num_blocks
    count, step_s = _fewest_recomputed(context, settings, most=most)
    fewer = replace(settings, kept_activations="products")
    if "kept_activations" not in given and count > 0 and settings.dropout == 0:
        of_products, its_s = _fewest_recomputed(context, fewer, most=most)
        if AS_FAST * its_s < step_s:
            reason = (
                f"kept_activations=products: {blocks - of_products} blocks keep what their products give and "
                f"compute the rest again; to keep everything there is room in {blocks - count}"
            )
            return replace(fewer, checkpointed_blocks=of_products), [reason]
    if count == blocks:
        return settings, []
    others = blocks - count
    keep = "block keeps its" if others == 1 else f"{others} blocks keep their"
    reason = f"checkpointed_blocks={count}: the other {keep} activations, for which there is room"
    return replace(settings, checkpointed_blocks=count), [reason]


def _fewest_recomputed(
    context: PlanningContext, settings: ExactOffloadSettings, *, most: bool
) -> tuple[int, float]:
    """Blocks to run again in the backward pass, and the step's seconds: the fewest that fit, or the `most`
    with which a step is as fast, since the memory of those that keep activations may as well stay free where
    the CPU decides. Without a limit that the user has named a tenth of the GPU stays free."""
    blocks, usable = context.shape.num_blocks, context.budget.fillable_gpu_bytes
    if usable is None:
        return blocks, math.inf

    def step_s(count: int) -> float:
        return context.step_s(replace(settings, checkpointed_blocks=count)) or math.inf

    def fits(count: int) -> bool:
        cost = context.cost(replace(settings, checkpointed_blocks=count))
        return gpu_bytes_needed(cost, context.budget) <= usable

    counts = range(blocks + 1)
    # One that runs again is made anew whole, so that none may take less than one.
    fewest = 0 if fits(0) else bisect_left(counts, True, key=fits)
    if fewest > blocks or (least_s := step_s(fewest)) == math.inf:
        return blocks, math.inf
    if not most:
        return fewest, least_s
    chosen = bisect_right(counts, NO_SLOWER * least_s, lo=fewest, key=step_s) - 1
    return (chosen, step_s(chosen)) if fits(chosen) else (fewest, least_s)


def weight_slots_for_room(context: PlanningContext, settings: ExactOffloadSettings) -> int:
    """Blocks that have room on the GPU at once: the fewest with which a streamed step is nearly as fast as
    with all that fit."""
    usable = context.budget.fillable_gpu_bytes
    if usable is None:
        return settings.weight_slots

    def step_s(count: int) -> float:
        return context.step_s(replace(settings, weight_slots=count)) or math.inf

    def is_too_much(count: int) -> bool:
        cost = context.cost(replace(settings, weight_slots=count))
        return gpu_bytes_needed(cost, context.budget) > usable

    counts = range(settings.weight_slots, context.shape.num_blocks)
    fitting = counts[: bisect_left(counts, True, key=is_too_much)]
    if not fitting:
        return settings.weight_slots
    enough_s = NEAR_FASTEST * step_s(fitting[-1])
    return fitting[bisect_left(fitting, True, key=lambda count: step_s(count) <= enough_s)]
