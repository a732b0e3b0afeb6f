"""Which precisions a machine and a method can both do, and what moments of fewer bits would gain: plans say
that, and choose none, as they are approximate. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engines import entry
from engines.shapes import Dtype
from profiles.machine import Machine
from profiles.planning.context import PlanningContext
from profiles.planning.predict import predict
from profiles.units import format_seconds

FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first GPUs with matrix products in bf16 (Ampere)."""

BY_COST: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
"""The order in which precisions are advised: the cheap ones first."""


INSTEAD = "; use --dtype "
"""Between why a precision does not go and those that do."""

CPU_BOUND = frozenset({"cpu", "host memory"})
"""What a step waits for where moments of fewer bytes help."""

WORTH_SAYING = 0.95
"""A step that takes more than this share of the one with fp32 moments is not worth a word."""


def why_no_dtype(machine: Machine, dtype: Dtype) -> str | None:
    """That the GPU has no matrix products in `dtype`, so that nothing can be timed; `None`: it has, or
    nothing says that it has not. A rate that was measured, of products that are emulated, counts."""
    gpu = machine.gpu
    if gpu is None or dtype != "bf16" or gpu.matmul_bf16_flops.value is not None:
        return None
    parts = (gpu.compute_capability or "").split(".")
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) >= FIRST_WITH_BF16:
        return None
    return f"{gpu.name} has no bf16 (compute capability {gpu.compute_capability}, it takes 8.0)"


def dtypes_for(engine: str, machine: Machine) -> tuple[Dtype, ...]:
    """Precisions in which `engine` trains on `machine`, the cheapest first."""
    refused = entry(engine).refuses
    on_cpu = machine.gpu is None
    return tuple(
        dtype
        for dtype in BY_COST
        if dtype not in refused and why_no_dtype(machine, dtype) is None and not (on_cpu and dtype == "fp16")
    )


def faster_moments(context: PlanningContext, settings: Any, kinds: Sequence[str]) -> str | None:
    """A plan's sentence on the first of `kinds` that makes a step faster which waits for the CPU's update;
    `None`: it waits for something else, or `settings` have moments that are approximate already."""
    if settings.moments != "fp32" or context.machine.gpu is None:
        return None
    now = predict(context.cost(settings), context.machine, context.workload)
    if now.step_s is None or now.bottleneck not in CPU_BOUND:
        return None
    for kind in kinds:
        cost = context.cost(replace(settings, moments=kind))
        step_s = predict(cost, context.machine, context.workload).step_s
        if step_s is not None and step_s <= WORTH_SAYING * now.step_s:
            return (
                f"not chosen unless set: moments={kind}, which is approximate, would make it "
                f"{format_seconds(step_s)} a step in place of {format_seconds(now.step_s)}"
            )
    return None
