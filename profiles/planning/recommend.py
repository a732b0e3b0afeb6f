"""Which engine, with which settings, and why: one plan per engine for a job on a machine. Pure; no torch.

A plan fits if its predicted peak, with what CUDA and the allocator need on top, is within the memory it may
use. Plans that fit come first, the fastest predicted step first. Closed forms throughout:
`profiles.planning.predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

from engines import entry, load_target
from engines.costs.mezo import num_probes
from engines.costs.resources.traffic import Traffic
from engines.settings.exact_offload import ExactOffloadSettings
from engines.settings.first_order import why_no_accumulation, why_no_checkpointing
from engines.settings.given import GivenSettings
from engines.settings.libraries import NO_LINEAR_LAYERS, QloraSettings
from engines.settings.lsp import NO_LINEAR_LAYERS_OF_TORCH, LspSettings
from engines.settings.parse import defaults
from engines.settings.zeroth_order import MezoSettings, approximation, why_no_base
from engines.shapes import ROUTER_LOSS, ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.budget import beside_torch_bytes, gpu_bytes_needed, taken_bytes, why_missing
from profiles.planning.context import Choice, PlanningContext
from profiles.planning.plan import Plan, Prediction
from profiles.planning.precisions import INSTEAD, dtypes_for, why_no_dtype
from profiles.planning.predict import compiling_s
from profiles.planning.ranks import context_of_a_rank
from profiles.rates import BETWEEN_GPUS, from_gpu
from profiles.units import format_rate, format_seconds


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
    arguments = job_arguments or {}
    plans: list[Plan] = []
    for engine in engines:
        given = overrides[engine] if engine in overrides else defaults(engine)
        of_a_rank = partial(
            context_of_a_rank,
            engine,
            machine,
            shape,
            workload,
            vram_bytes=vram_bytes,
            host_bytes=host_bytes,
            pinned_limit_bytes=pinned_limit_bytes,
        )
        context = of_a_rank(gpus=gpus, nodes=nodes)
        plan = plan_engine(context, given, arguments.get(engine, ""))
        plans.append(with_scaling(plan, context, of_a_rank(), given))
    return sorted(plans, key=rank)


def rank(plan: Plan) -> tuple[bool, bool, bool, float]:
    """What `recommend` sorts by. A step of a zeroth-order method is not worth one with gradients, so times of
    the two are not mixed."""
    step_s = plan.prediction.step_s
    return (not plan.fits, entry(plan.engine).order == "zeroth", step_s is None, step_s or 0.0)


def plan_engine(context: PlanningContext, given: GivenSettings, job_arguments: str = "") -> Plan:
    """The plan of one method; `given` wins over what is chosen."""
    engine = context.engine
    settings, reasons = _choose(context, given)
    cost = context.cost(settings.typed)
    unsuitable = _unsuitable(context, settings.typed)
    why_not = unsuitable or why_missing(cost, context.budget)
    if entry(engine).order == "zeroth":
        passes = "two" if cost.forwards == 2 else f"{cost.forwards:g}"
        reasons = (
            *reasons,
            f"{passes} forward passes a step and no gradient: cheap steps, but many are needed",
        )
    if (approximate := approximation(settings)) is not None:
        reasons = (*reasons, approximate)
    if given:
        assigned = ", ".join(f"{key}={value}" for key, value in given.items())
        reasons = (*reasons, f"as set: {assigned}")
    return Plan(
        engine=engine,
        settings=settings,
        fits=why_not is None,
        why_not=why_not,
        available=unsuitable is None,
        prediction=_prediction(context, settings.typed),
        reasons=reasons,
        verify_command=" ".join(f"lspzo-bench compare {job_arguments} --engine {engine}".split()),
    )


def _prediction(context: PlanningContext, settings: Any) -> Prediction:
    """With what only some steps, or the process, take."""
    cost = context.cost(settings)
    return replace(
        _of_machine(context.predict(settings), context.local_ranks),
        compile_s=compiling_s(settings, context.machine),
        **_rare(cost, context),
        **_gpu_bytes(cost, context),
    )


class _Rare(TypedDict):
    rare_s: float | None
    rare_every: int | None


def _rare(cost: Traffic, context: PlanningContext) -> _Rare:
    """What one step in so many takes beside: known of GPUs alone."""
    if cost.rare is None or context.machine.gpu is None:
        return _Rare(rare_s=None, rare_every=None)
    return _Rare(rare_s=cost.rare.gpu_s, rare_every=cost.rare.every_steps)


class _GpuBytes(TypedDict):
    reserved_gpu_bytes: int | None
    gpu_bytes_beside: int | None
    needed_gpu_bytes: int | None


def _gpu_bytes(cost: Traffic, context: PlanningContext) -> _GpuBytes:
    """What the process takes of the GPU: what torch reserves, and the rest."""
    if context.machine.gpu is None:
        return _GpuBytes(reserved_gpu_bytes=None, gpu_bytes_beside=None, needed_gpu_bytes=None)
    return _GpuBytes(
        reserved_gpu_bytes=taken_bytes(cost, context.budget),
        gpu_bytes_beside=beside_torch_bytes(cost, context.budget),
        needed_gpu_bytes=gpu_bytes_needed(cost, context.budget),
    )


def _of_machine(prediction: Prediction, local_ranks: int) -> Prediction:
    """Host memory is that of all ranks of the machine, as it is measured; the rest is that of one."""
    return replace(
        prediction,
        peak_host_bytes=prediction.peak_host_bytes * local_ranks,
        pinned_bytes=prediction.pinned_bytes * local_ranks,
    )


def with_scaling(plan: Plan, context: PlanningContext, one: PlanningContext, given: GivenSettings) -> Plan:
    """`plan`, made in `context`, with what several GPUs bring; as it is for one GPU or where it does not
    fit. `one`: the same job on one GPU."""
    if context.ranks == 1 or not plan.fits:
        return plan
    return replace(plan, reasons=(*plan.reasons, *_scaling(plan, context, one, given)))


def _scaling(
    plan: Plan, context: PlanningContext, one: PlanningContext, given: GivenSettings
) -> tuple[str, ...]:
    """What several GPUs bring, by the plans of one: for the same step, and for a GPU's part of it alone."""
    whole = plan_engine(one, given)
    found = _supposed_between_gpus(plan, context)
    part = plan_engine(replace(one, workload=context.workload), given)
    step_s, alone_s, part_s = (each.prediction.step_s for each in (plan, whole, part))
    if not whole.fits or not alone_s:
        return found
    if step_s is None:
        return (*found, f"on one GPU a step takes {format_seconds(alone_s)}")
    if alone_s <= step_s:
        return (
            *found,
            f"{context.ranks} GPUs bring nothing here: on one a step takes {format_seconds(alone_s)}",
        )
    if not part_s:
        return found
    return (
        *found,
        f"on {context.ranks} GPUs a step is {alone_s / step_s:.2f} times as fast as on one "
        f"({format_seconds(alone_s)}): strong scaling {alone_s / step_s / context.ranks:.0%}, weak "
        f"{part_s / step_s:.0%}",
        *_unlike(plan, whole),
    )


OF_THE_RESULT = ("d", "r", "moments")
"""Settings that planners choose and that change what a step comes to."""


def _unlike(plan: Plan, alone: Plan) -> tuple[str, ...]:
    """That the step on one GPU has another result."""
    others = [
        f"{name}={alone.settings.get(name)}"
        for name in OF_THE_RESULT
        if alone.settings.get(name) != plan.settings.get(name)
    ]
    return (f"on one GPU it is another step, with {', '.join(others)}",) if others else ()


def _supposed_between_gpus(plan: Plan, context: PlanningContext) -> tuple[str, ...]:
    """That a step which the way between GPUs decides rests on no measurement of it."""
    if plan.prediction.bottleneck != "gpu to gpu":
        return ()
    name, rate = from_gpu(context.cost(plan.settings.typed), context.machine)
    if name == BETWEEN_GPUS:
        return ()
    return (
        f"GPUs are supposed to reach each other as fast as the link, {format_rate(rate.value)}: 'lspzo-bench "
        "probe' on that machine measures it",
    )


def _choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """By the method's own planner, if it has one."""
    planner = entry(context.engine).planner
    if planner is None:
        return Choice(given)
    choice: Choice = load_target(planner)(context, given)
    return choice


def _unsuitable(context: PlanningContext, settings: Any) -> str | None:
    """Why the engine cannot run the job with these typed settings at all, whatever the memory."""
    engine, machine, workload = context.engine, context.machine, context.workload
    row = entry(engine)
    if context.ranks > 1 and not row.several_gpus:
        return "runs on one GPU"
    if context.nodes > 1 and not row.several_machines:
        return "runs on one machine"
    probes = num_probes(settings) if isinstance(settings, MezoSettings) else 1
    if context.ranks > context.micro_batches * probes:
        count, of = context.micro_batches, context.ranks
        return (
            f"has {count} micro-batch{'es' * (count > 1)} a step for {of} processes; use --accumulation {of}"
        )
    refused = settings.of_one_process if isinstance(settings, ExactOffloadSettings) else None
    if context.ranks > 1 and refused is not None:
        return f"{refused[0]}; set {refused[1]}"
    if row.needs_gpu and machine.gpu is None:
        return "needs a CUDA GPU, and this machine has none"
    is_block_major = isinstance(settings, LspSettings) and settings.block_major
    if (why := context.shape.why_not_walked("block_major" if is_block_major else row.walk)) is not None:
        return f"{why}; set output_router_logits to false in config.json" if why == ROUTER_LOSS else why
    if workload.checkpointing and (why := why_no_checkpointing(settings, context.shape)) is not None:
        return f"{why}; use --no-checkpointing"
    has_none = not context.shape.matrices or context.shape.family in NO_LINEAR_LAYERS_OF_TORCH
    if isinstance(settings, LspSettings) and has_none:
        return "compresses matrices, and the blocks of this model have none"
    if isinstance(settings, QloraSettings) and context.shape.family in NO_LINEAR_LAYERS:
        return "needs linear layers for its four bits, and the blocks of this model have others; use lora"
    others = dtypes_for(engine, machine)
    instead = f"{INSTEAD}{' or '.join(others)}" if others else "; no precision is left"
    if (why := row.refuses.get(workload.dtype)) is not None:
        return f"{why}{instead}"
    if (why := why_no_dtype(machine, workload.dtype)) is not None:
        return f"{why}{instead}"
    if (why := why_no_base(settings, workload.dtype)) is not None:
        return f"base=lossless {why}"
    return why_no_accumulation(settings, workload.accumulation)
