"""Which engine, with which settings, and why: one plan per engine for a job on a machine. Pure; no torch.

A plan fits if its predicted peak, with what CUDA and the allocator need on top, is within the memory it may
use. Plans that fit come first, the fastest predicted step first. Closed forms throughout:
`profiles.planning.predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines import entry, load_target
from engines.settings.given import GivenSettings
from engines.settings.parse import defaults
from engines.settings.zeroth_order import approximation
from engines.shapes import ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.budget import budget_of, why_missing
from profiles.planning.context import Choice, PlanningContext
from profiles.planning.plan import Plan
from profiles.planning.predict import predict
from profiles.planning.ranks import machine_of_a_rank, workload_of_a_rank
from profiles.units import format_bytes, format_seconds


def recommend(
    machine: Machine,
    shape: ModelShape,
    workload: Workload,
    engines: Sequence[str],
    overrides: Mapping[str, GivenSettings],
    *,
    vram_bytes: int | None = None,
    host_bytes: int | None = None,
    pinned_limit_bytes: int | None = None,
    job_arguments: Mapping[str, str] | None = None,
    gpus: int = 1,
    nodes: int = 1,
) -> list[Plan]:
    """One plan per engine of `engines`: those that fit first, then by predicted step time.

    `overrides` holds settings by engine name; they win over chosen ones and are kept as given.
    `vram_bytes`, `host_bytes` and `pinned_limit_bytes` are limits below what the machine has.
    `job_arguments` are the job's command-line arguments by engine name, for the commands that check plans.
    With several `gpus`, or `nodes` of so many, a plan is that of the slowest of the processes: its part of
    the step, on its part of the machine.

    Raises `UserError` for an unknown engine or setting.
    """
    machine, workload = machine_of_a_rank(machine, gpus), workload_of_a_rank(workload, gpus * nodes)
    host_bytes = None if host_bytes is None else host_bytes // gpus
    budget = budget_of(machine, vram_bytes, host_bytes, pinned_limit_bytes)
    told = job_arguments or {}
    plans = [
        _plan(
            PlanningContext(engine=engine, machine=machine, shape=shape, workload=workload, budget=budget),
            overrides[engine] if engine in overrides else defaults(engine),
            told.get(engine, ""),
            several=gpus * nodes > 1,
        )
        for engine in engines
    ]
    return sorted(plans, key=_rank)


def why_first(plans: Sequence[Plan]) -> str:
    """One sentence: the numbers that put the first of the ranked `plans` there."""
    if not plans:
        return "There is no plan."
    first = plans[0]
    if not first.fits:
        able = [plan for plan in plans if plan.available]
        if not able:
            return _none_can_run(plans)
        nearest = min(able, key=_memory)
        return f"No engine fits; the smallest is {nearest.engine}: it {nearest.why_not}."
    fitting = [plan for plan in plans if plan.fits]
    if len(fitting) == 1:
        return _only_one_fits(first, plans[1:])
    second = fitting[1]
    if first.prediction.step_s is None or second.prediction.step_s is None:
        sizes = " against ".join(format_bytes(_memory(plan)) for plan in (first, second))
        order = _order_without_times(first)
        return f"{first.engine} comes first, {order} ({sizes} of memory for {second.engine})."
    told = (
        f"{first.engine} comes first with {format_seconds(first.prediction.step_s)} predicted per step, "
        f"before {second.engine} with {format_seconds(second.prediction.step_s)}"
    )
    rival = next((plan for plan in fitting if entry(plan.engine).order == "first"), None)
    if entry(first.engine).order == "zeroth" and rival is not None:
        told += f"; a zeroth-order step learns less than one of {rival.engine}, so compare losses too"
    return f"{told}."


def _none_can_run(plans: Sequence[Plan]) -> str:
    engines: dict[str | None, list[str]] = {}
    for plan in plans:
        engines.setdefault(plan.why_not, []).append(plan.engine)
    reasons = ". ".join(f"{', '.join(names)}: it {why}" for why, names in engines.items())
    return f"No engine can run this job. {reasons}."


def _only_one_fits(first: Plan, others: Sequence[Plan]) -> str:
    if not others:
        return f"{first.engine} is the only plan, and it fits: {format_bytes(_memory(first))} of memory."
    nearest = min(others, key=_memory)
    return (
        f"{first.engine} is the only plan that fits, with {format_bytes(_memory(first))} of memory; "
        f"{nearest.engine} {nearest.why_not}."
    )


def _order_without_times(first: Plan) -> str:
    if first.prediction.step_s is None:
        return "but without a predicted time"
    return f"the only one with a predicted time, {format_seconds(first.prediction.step_s)} per step"


def _rank(plan: Plan) -> tuple[bool, bool, float]:
    step_s = plan.prediction.step_s
    return (not plan.fits, step_s is None, step_s or 0.0)


def _plan(context: PlanningContext, given: GivenSettings, job_arguments: str, *, several: bool) -> Plan:
    engine = context.engine
    settings, reasons = _choose(context, given)
    cost = context.cost(settings.typed)
    unsuitable = _unsuitable(engine, context.machine, context.workload, several=several)
    why_not = unsuitable or why_missing(cost, context.budget)
    if entry(engine).order == "zeroth":
        reasons = (*reasons, "two forward passes a step and no gradient: cheap steps, but many are needed")
    if (approximate := approximation(settings)) is not None:
        reasons = (*reasons, approximate)
    if given:
        told = ", ".join(f"{key}={value}" for key, value in given.items())
        reasons = (*reasons, f"as set: {told}")
    return Plan(
        engine=engine,
        settings=settings,
        fits=why_not is None,
        why_not=why_not,
        available=unsuitable is None,
        prediction=predict(cost, context.machine, context.workload),
        reasons=reasons,
        verify_command=" ".join(f"lspzo-bench compare {job_arguments} --engine {engine}".split()),
    )


def _choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """By the method's own planner, if it has one."""
    planner = entry(context.engine).planner
    if planner is None:
        return Choice(given)
    choice: Choice = load_target(planner)(context, given)
    return choice


def _unsuitable(engine: str, machine: Machine, workload: Workload, *, several: bool) -> str | None:
    """Why the engine cannot run the job at all, whatever the memory."""
    row = entry(engine)
    if several and not row.several_gpus:
        return "runs on one GPU"
    if row.needs_gpu and machine.gpu is None:
        return "needs a CUDA GPU, and this machine has none"
    return row.refuses.get(workload.dtype)


def _memory(plan: Plan) -> int:
    """The memory that decides: the GPU's, or the host's where there is none."""
    return plan.prediction.peak_gpu_bytes or plan.prediction.peak_host_bytes
