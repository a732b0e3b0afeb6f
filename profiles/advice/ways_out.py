"""For a method that does not fit: the smallest change with which it does, and its price in time and quality.

Changes that compute the same come first (micro-batches, recomputation), then settings of the method that cost
quality, then shorter sequences, then all of them together. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from engines import entry, load_target
from engines.errors import UserError
from engines.settings.given import GivenSettings
from engines.shapes import Workload
from profiles.advice import words
from profiles.planning.context import PlanningContext, SettingChange
from profiles.planning.plan import Plan
from profiles.planning.precisions import dtypes_for
from profiles.planning.recommend import plan_engine

SHORTEST = 64
"""Tokens of the shortest sequence that is proposed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WayOut:
    """A change with which a method fits."""

    engine: str
    flags: str
    """What to type beside, or in place of, what the job was given with."""
    quality: str
    """What it costs beside time."""
    plan: Plan
    times: float | None
    """Predicted step over that of the plan that does not fit, of as many tokens; `None`: one of the two has
    no time, or its steps are of fewer tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    workload: Workload
    settings: GivenSettings
    ranks: int = 1
    flags: tuple[str, ...] = ()
    quality: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocked:
    """Why no change that was tried lets a method fit."""

    engine: str
    why: str


def way_out(plan: Plan, context: PlanningContext, given: GivenSettings) -> WayOut | Blocked | None:
    """The smallest change that lets `plan` fit, which was made in `context` with `given`; `None`: it fits."""
    if plan.fits:
        return None
    start = _Change(workload=context.workload, settings=given, ranks=context.ranks)
    blocked = Blocked(engine=plan.engine, why=plan.why_not or "")
    for begun in _runnable(plan, context, start):
        least = [_plan(context, each) for each in _least_of_all(context, begun)]
        if not any(each.fits for each in least):
            nearest = min(least, key=lambda each: each.prediction.peak_gpu_bytes)
            if nearest.available:
                blocked = Blocked(engine=plan.engine, why=words.even_so(SHORTEST, nearest.why_not or ""))
            continue
        for change in _in_order(context, begun):
            found = _plan(context, change)
            if found.fits:
                return _way_out(plan, found, context, change)
    return blocked


def _least_of_all(context: PlanningContext, change: _Change) -> Iterator[_Change]:
    """The shortest sequences, one at a time, recomputed, with each of the method's own changes. If none of
    these fits, nothing does."""
    tokens = min(change.workload.seq_len, SHORTEST)
    smallest = _least(replace(change, workload=replace(change.workload, checkpointing=True, seq_len=tokens)))
    yield smallest
    yield replace(smallest, workload=replace(smallest.workload, batch_size=1, accumulation=1))
    yield from _own_settings(context, smallest)
    yield from _cheaper_dtype(context, smallest)


def _way_out(plan: Plan, found: Plan, context: PlanningContext, change: _Change) -> WayOut:
    before, after = plan.prediction.step_s, found.prediction.step_s
    is_like = plan.available and change.workload.tokens_per_step == context.workload.tokens_per_step
    return WayOut(
        engine=plan.engine,
        flags=" ".join(change.flags),
        quality=words.of_prices(change.quality),
        plan=found,
        times=after / before if before and after and is_like else None,
    )


def _plan(context: PlanningContext, change: _Change) -> Plan:
    return plan_engine(replace(context, workload=change.workload), change.settings)


def _runnable(plan: Plan, context: PlanningContext, start: _Change) -> Iterator[_Change]:
    """The job in a precision that machine and method can both do."""
    if plan.available:
        yield start
        return
    for dtype in dtypes_for(context.engine, context.machine):
        if dtype != context.workload.dtype:
            yield replace(
                start,
                workload=replace(start.workload, dtype=dtype),
                flags=(f"--dtype {dtype}",),
                quality=(words.of_dtype(dtype),),
            )


def _in_order(context: PlanningContext, start: _Change) -> Iterator[_Change]:
    """Single changes and then several, the cheapest first. Lazy: what comes later costs time to try."""
    if start.flags:
        yield start
    exact = [start, *_recomputing(start)]
    for each in exact:
        if each is not start:
            yield each
        yield from _micro_batches(each)
    own = list(_own_settings(context, start))
    yield from own
    yield from _cheaper_dtype(context, start)
    least = _least(exact[-1])
    for changed in own:
        yield _both(changed, least)
    # Some methods hold more with one micro-batch than with several.
    cut = [*_shorter(context, least), *_shorter(context, start)]
    yield from sorted(cut, key=lambda each: -each.workload.seq_len)
    for changed in own:
        yield from _shorter(context, _both(changed, least))


def _recomputing(change: _Change) -> Iterator[_Change]:
    if not change.workload.checkpointing:
        yield replace(
            change,
            workload=replace(change.workload, checkpointing=True),
            flags=(*change.flags, "--checkpointing"),
        )


def _micro_batches(change: _Change) -> Iterator[_Change]:
    """The largest first; with more of them, so that a step is on as many sequences. Of several processes each
    takes its part of the micro-batches that are typed."""
    whole = change.workload.batch_size
    for size in range(whole - 1, 0, -1):
        if whole % size == 0:
            count = change.workload.accumulation * (whole // size)
            yield replace(
                change,
                workload=replace(change.workload, batch_size=size, accumulation=count),
                flags=(*change.flags, f"--batch-size {size} --accumulation {change.ranks * count}"),
            )


def _least(change: _Change) -> _Change:
    """With the smallest micro-batches."""
    return ([change, *_micro_batches(change)])[-1]


def _own_settings(context: PlanningContext, change: _Change) -> Iterator[_Change]:
    target = entry(context.engine).ways_out
    changes: tuple[SettingChange, ...] = () if target is None else load_target(target)
    for each in changes:
        try:
            settings = change.settings.replaced(**each.values)
        except UserError:  # with what the user has set it makes no sense
            continue
        flags = [f"--set {context.engine}.{key}={_text(value)}" for key, value in each.values.items()]
        yield replace(
            change,
            settings=settings,
            flags=(*change.flags, *flags),
            quality=(*change.quality, each.quality),
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cheaper_dtype(context: PlanningContext, change: _Change) -> Iterator[_Change]:
    if change.workload.dtype == "fp32":
        for dtype in dtypes_for(context.engine, context.machine):
            if dtype != "fp32":
                yield replace(
                    change,
                    workload=replace(change.workload, dtype=dtype),
                    flags=(*change.flags, f"--dtype {dtype}"),
                    quality=(*change.quality, words.of_dtype(dtype)),
                )


def _shorter(context: PlanningContext, change: _Change) -> Iterator[_Change]:
    """The longest sequences with which it fits, if any do."""

    def of(tokens: int) -> _Change:
        return replace(
            change,
            workload=replace(change.workload, seq_len=tokens),
            flags=(*change.flags, f"--seq-len {tokens}"),
            quality=(*change.quality, words.of_shorter(tokens)),
        )

    step = SHORTEST
    longest = _most(1, (change.workload.seq_len - 1) // step, lambda n: _plan(context, of(n * step)).fits)
    if longest is not None:
        yield of(longest * step)


def _most(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` that `holds`; where one does not, no larger one does."""
    if high < low or not holds(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _both(changed: _Change, least: _Change) -> _Change:
    """The settings of one with the workload of the other."""
    return replace(
        changed,
        workload=least.workload,
        flags=tuple(dict.fromkeys((*changed.flags, *least.flags))),
        quality=tuple(dict.fromkeys((*changed.quality, *least.quality))),
    )
