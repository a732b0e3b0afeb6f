"""Which precisions a machine and a method can both do. Pure; no torch."""

from __future__ import annotations

from engines import entry
from engines.shapes import Dtype
from profiles.machine import Machine

FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first GPUs with matrix products in bf16 (Ampere)."""

BY_COST: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
"""The order in which precisions are advised: the cheap ones first."""

INSTEAD = "; use --dtype "
"""Between why a precision does not go and those that do."""


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
