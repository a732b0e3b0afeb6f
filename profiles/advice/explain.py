"""A plan's numbers, filled into the formulas that they come from. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator

from engines.costs.traffic import Traffic
from profiles.advice.job_time import JobForecast, sum_of_parts
from profiles.planning.budget import gpu_bytes_needed
from profiles.planning.context import PlanningContext
from profiles.planning.plan import Plan
from profiles.planning.predict import resource_s
from profiles.units import format_bytes, format_elements, format_flops, format_rate, format_seconds


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
    amounts = (
        ("gpu", cost.gpu_flops, format_flops, "products"),
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
            more = ", with what is beside products" if name == "gpu" else ""
            rate, taken = formatted(amount / times[name]), format_seconds(times[name])
            yield f"{name} = {total} {what} / {rate} = {taken}{more}"
    overlap = cost.overlap.replace("_", " ")
    if plan.prediction.step_s is not None:
        yield (
            f"step = these, overlapped as '{overlap}' has it, = {format_seconds(plan.prediction.step_s)}; "
            f"limited by {plan.prediction.bottleneck or 'nothing'}"
        )


def _amount(name: str, amount: float) -> str:
    if name == "gpu":
        return format_flops(amount).replace("/s", "")
    if name == "cpu":
        return format_elements(amount).replace("/s", " elements")
    return format_bytes(amount)
