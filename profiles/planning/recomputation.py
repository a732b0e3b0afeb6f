"""Which blocks are recomputed, for methods whose settings say how blocks run: as few as fit; and whether the
loss is computed in chunks: where nothing fits without, or where a step is faster with it. No torch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

from engines.settings.given import GivenSettings
from engines.shapes import OWN_LOGITS_FAMILIES
from profiles.planning.budget import shortages, why_missing
from profiles.planning.context import AS_FAST, Choice, PlanningContext
from profiles.units import format_seconds

LOSS_TOKENS = 1024
"""Positions of a chunk: enough for full speed in products with a vocabulary."""

FEWER_LOSS_TOKENS, FEWEST_LOSS_TOKENS = 256, 64
"""Of smaller ones; the last where a micro-batch is one sequence and cannot be smaller. The vocabulary's
weights are read anew for each chunk, which no prediction counts."""


def fewest_recomputed(context: PlanningContext, given: GivenSettings) -> Choice:
    """`checkpointed_blocks`, where --checkpointing allows any; `loss_tokens`, where nothing fits without it
    or a step is faster with it; `graphs`, where nothing fits with them or a step is faster without them; and
    no compiler where there is no GPU."""
    found = _fewest(context, given)
    if context.machine.gpu is None or not hasattr(given.typed, "loss_tokens"):
        return found
    missing = context.why_missing(found.settings.typed)
    if missing is None:
        return _faster_without_graphs(context, given, _faster_in_chunks(context, given, found))
    chosen = _in_chunks(context, given, missing) or _without_graphs(context, given, missing)
    return chosen or _nearest(context, given, found)


def _nearest(context: PlanningContext, given: GivenSettings, found: Choice) -> Choice:
    """Of what does not fit either way: no CUDA graphs, if less is missing without them and their pool, so
    that nobody is told a larger shortage than there is."""
    if "graphs" in given or not getattr(found.settings.typed, "graphs", False):
        return found
    plain = _fewest(context, given.completed(graphs=False))
    lacking = [
        sum(each.missing_bytes for each in shortages(context.cost(one.settings.typed), context.budget))
        for one in (found, plain)
    ]
    return plain if lacking[1] < lacking[0] else found


def _fewest(context: PlanningContext, given: GivenSettings) -> Choice:
    if context.machine.gpu is None:
        chosen = {
            name: False for name in ("compile", "graphs") if name not in given and hasattr(given.typed, name)
        }
        return Choice(given.completed(**chosen))
    if "checkpointed_blocks" in given or not context.workload.checkpointing:
        return Choice(given)
    count = context.shape.num_blocks
    fewest = 0
    if not _fits(context, given, 0):  # the more blocks run again, from the first on, the less they take
        fewest = bisect_left(range(count + 1), True, lo=1, key=lambda number: _fits(context, given, number))
    if fewest > count:
        return Choice(given)
    if fewest == 0:
        reason = "all activations fit, so that nothing is computed twice"
    else:
        less: Any = given.completed(checkpointed_blocks=fewest - 1).typed
        spare = f"leave less than {context.cost(less).gpu_spare:.0%} of the GPU free"
        why = "do not fit" if context.why_missing(less) else spare
        which = "every block runs" if fewest == count else f"the first {fewest} of {count} run"
        reason = f"{which} again in the backward pass; fewer {why}"
    return Choice(given.completed(checkpointed_blocks=fewest), (f"checkpointed_blocks={fewest}: {reason}",))


def _faster_in_chunks(context: PlanningContext, given: GivenSettings, whole: Choice) -> Choice:
    """`whole`, whose loss is of all positions at once; or chunks, if the room that they leave to activations
    makes a step faster."""
    settings: Any = whole.settings.typed
    if "checkpointed_blocks" in given or not settings.recomputed(
        context.shape.num_blocks, checkpointing=True
    ):
        return whole
    chunks = _in_chunks(context, given, "")
    if chunks is None:
        return whole
    before, after = (context.step_s(each.settings.typed) for each in (whole, chunks))
    if before is None or after is None or AS_FAST * after > before:
        return whole
    tokens = chunks.settings.typed.loss_tokens
    reason = (
        f"loss_tokens={tokens}: logits leave more room to activations, {format_seconds(after)} a step, else "
        f"{format_seconds(before)}"
    )
    return Choice(chunks.settings, (reason, *chunks.reasons[1:]))


def _faster_without_graphs(context: PlanningContext, given: GivenSettings, captured: Choice) -> Choice:
    """`captured`, or no CUDA graphs, if the room that they leave to activations makes a step faster."""
    settings: Any = captured.settings.typed
    if "graphs" in given or not getattr(settings, "graphs", False) or "checkpointed_blocks" in given:
        return captured
    if not settings.recomputed(context.shape.num_blocks, checkpointing=context.workload.checkpointing):
        return captured
    plain = given.completed(graphs=False)
    found = _faster_in_chunks(context, plain, _fewest(context, plain))
    before, after = (context.step_s(each.settings.typed) for each in (captured, found))
    if before is None or after is None or AS_FAST * after > before:
        return captured
    reason = (
        f"graphs=false: without CUDA graphs there is more room for activations, {format_seconds(after)} a "
        f"step, else {format_seconds(before)}"
    )
    return Choice(found.settings, (reason, *found.reasons))


def _without_graphs(context: PlanningContext, given: GivenSettings, missing: str) -> Choice | None:
    """No CUDA graphs, if without them and their pool the job fits; `missing` is why it does not with them."""
    if "graphs" in given or not hasattr(given.typed, "graphs"):
        return None
    plain = given.completed(graphs=False)
    found = _fewest(context, plain)
    if context.why_missing(found.settings.typed) is not None:
        chunks = _in_chunks(context, plain, missing)
        if chunks is None:
            return None
        found = chunks
        captured = given.completed(loss_tokens=chunks.settings.typed.loss_tokens)
        missing = context.why_missing(_fewest(context, captured).settings.typed) or missing
    reason = f"graphs=false: with CUDA graphs and their pool it {missing}"
    return Choice(found.settings, (reason, *found.reasons))


def _in_chunks(context: PlanningContext, given: GivenSettings, missing: str) -> Choice | None:
    """`loss_tokens`, if with it the job fits, and as few recomputed blocks as fit then; `missing` is why it
    does not fit without."""
    if "loss_tokens" in given or not _has_chunks(context):
        return None
    whole = context.workload.batch_size * context.workload.seq_len
    last = (FEWEST_LOSS_TOKENS,) if context.workload.batch_size == 1 else ()
    for chunk in (LOSS_TOKENS, FEWER_LOSS_TOKENS, *last):
        found = _fewest(context, given.completed(loss_tokens=chunk))
        if chunk < whole and context.why_missing(found.settings.typed) is None:
            reason = f"loss_tokens={chunk}: without it the job {missing}"
            return Choice(found.settings, (reason, *found.reasons))
    return None


def _has_chunks(context: PlanningContext) -> bool:
    """Whether an engine can compute the loss in chunks (`engines.first_order.head_loss`)."""
    is_plain = context.shape.head == "causal_lm" and context.shape.family not in OWN_LOGITS_FAMILIES
    return is_plain and not context.workload.words_alone


def _fits(context: PlanningContext, given: GivenSettings, recomputed: int) -> bool:
    """With room to spare where the user has named no limit, unless there is nothing left to recompute."""
    settings: Any = given.completed(checkpointed_blocks=recomputed).typed
    budget, cost = context.budget, context.cost(settings)
    if recomputed < context.shape.num_blocks:
        budget = replace(budget, gpu_bytes=budget.filled_but(cost.gpu_spare))
    return why_missing(cost, budget) is None
