"""A plan's numbers, filled into the formulas that they come from. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator

from engines.costs.resources.traffic import Traffic
from profiles.advice.job_time import JobForecast, sum_of_parts
from profiles.planning.budget import gpu_bytes_needed
from profiles.planning.context import PlanningContext
from profiles.planning.layer_times import gpu_parts, resource_s
from profiles.planning.plan import Plan
from profiles.units import format_bytes, format_elements, format_flops, format_rate, format_seconds

WORTH_NAMING = 0.01
"""Share of the GPU's time from which waiting is named."""


def explained(plan: Plan, context: PlanningContext, forecast: JobForecast | None) -> tuple[str, ...]:
    """Lines: what each resource has to do, at which rate, and what follows."""
    cost = context.cost(plan.settings.typed)
    lines = [*_memory(cost, context), *_time(cost, context, plan)]
    if forecast is not None and forecast.seconds is not None and forecast.steps > 1:
        lines.append(
            f"job = {forecast.steps:,} steps: {format_seconds(forecast.seconds)} "
            f"({format_seconds(forecast.seconds_low)} to {format_seconds(forecast.seconds_high)})"
        )
    lines.append(f"rests on: {plan.prediction.basis}")
    return tuple(lines)


def _memory(cost: Traffic, context: PlanningContext) -> Iterator[str]:
    budget = context.budget
    if budget.gpu_bytes is not None:
        needed_bytes = gpu_bytes_needed(cost, budget)
        yield (
            f"GPU memory = {sum_of_parts(cost.gpu_memory_bytes)} = {format_bytes(cost.peak_gpu_bytes)} "
            f"of tensors; with CUDA and what the allocator cannot use {format_bytes(needed_bytes)} "
            f"of {format_bytes(budget.gpu_bytes)}"
        )
    yield (
        f"host memory = {sum_of_parts(cost.host_memory_bytes)} = {format_bytes(cost.peak_host_bytes)} "
        f"of {format_bytes(budget.host_bytes)}"
    )


def _time(cost: Traffic, context: PlanningContext, plan: Plan) -> Iterator[str]:
    times = resource_s(cost, context.machine, context.workload)
    if times is None:
        return
    yield from _gpu(cost, context)
    amounts = (
        ("h2d", cost.h2d_bytes, format_rate, "up"),
        ("d2h", cost.d2h_bytes, format_rate, "down"),
        ("cpu", cost.cpu_adam_elements, format_elements, "AdamW on the CPU"),
        ("host memory", cost.host_bytes, format_rate, "through host memory"),
        ("disk", cost.disk_bytes, format_rate, "read from disk"),
        ("gpu to gpu", cost.from_gpu_bytes, format_rate, "from the other GPUs"),
    )
    for name, amount, formatted, what in amounts:
        if amount and times[name]:
            total = _amount(name, amount)
            rate, taken = formatted(amount / times[name]), format_seconds(times[name])
            yield f"{name} = {total} {what} / {rate} = {taken}"
    overlap = cost.overlap.replace("_", " ")
    if waited_s := context.network_s(plan.settings.typed):
        rate = format_rate(context.supposed_network_bytes_per_s)
        yield (
            f"network = losses and gradients of {context.nodes} machines at {rate} (supposed) = "
            f"{format_seconds(waited_s)}"
        )
    then = ", then the network" if waited_s else ""
    if plan.prediction.step_s is not None:
        yield (
            f"step = these, overlapped as '{overlap}' has it{then}, = "
            f"{format_seconds(plan.prediction.step_s)}; "
            f"limited by {plan.prediction.bottleneck or 'nothing'}"
        )


def _gpu(cost: Traffic, context: PlanningContext) -> Iterator[str]:
    """The GPU's time by what it goes into: where it waits for the CPU to start its work it is not slow."""
    parts = gpu_parts(cost, context.machine, context.workload)
    if parts is None or not cost.gpu_flops or not parts.products_s:
        return
    products = format_flops(cost.gpu_flops).replace("/s", "")
    rate = format_flops(cost.gpu_flops / parts.products_s)
    whole_s = parts.products_s + parts.between_s + parts.starting_s
    line = f"gpu = {products} products / {rate} ({format_seconds(parts.products_s)})"
    line += f" + what lies between them ({format_seconds(parts.between_s)})"
    if parts.starting_s >= WORTH_NAMING * whole_s:
        line += f" + waiting for the CPU to start its operations ({format_seconds(parts.starting_s)})"
    yield f"{line} = {format_seconds(whole_s)}"


def _amount(name: str, amount: float) -> str:
    if name == "cpu":
        return format_elements(amount).replace("/s", " elements")
    return format_bytes(amount)
