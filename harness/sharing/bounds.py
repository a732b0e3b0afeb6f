"""What no hardware of today can do: bounds on a shared result, by the bytes and FLOPs of its method."""

from __future__ import annotations

from engines.costs.resources.traffic import Traffic
from engines.costs.table import traffic
from engines.errors import UserError
from engines.settings.parse import parse_recorded
from engines.shapes import ModelShape, Workload
from harness.models.closed_forms import shape_of_config
from harness.models.configs import NAMED_SHAPES, load_config
from harness.records.job import ModelSource
from harness.sharing.shared_result import SharedMethod, Submission
from profiles.units import format_bytes, format_seconds

MOST_FLOPS = {"bf16": 2.6e15, "fp16": 2.6e15, "fp32": 1.3e15}
"""Of one GPU, dense; fp32 as TF32. No card of 2026 reaches them."""
MOST_CPU_FLOPS = 2e14
MOST_LINK_BYTES_PER_S = 1.3e11
"""One way, PCIe 6 x16."""
LEAST_OF_MEMORY = 0.4
"""Of the GPU memory that a method's tensors are counted to take: below, they were not there."""


def impossible(found: Submission, method: SharedMethod) -> str | None:
    """Why this cannot have been measured; `None`: nothing tells against it."""
    machine = found.machine
    numbers = [*method.step_s, method.tokens_per_s, method.energy_j, method.predicted_step_s]
    if any(value is not None and not 0 < value < float("inf") for value in numbers):
        return "holds a number that is none, 0 or less"
    if len(method.step_s) > method.runs:
        return "has more medians than runs"
    if method.gpu_bytes and machine.gpu_memory_bytes and method.gpu_bytes > machine.gpu_memory_bytes:
        return f"took {format_bytes(method.gpu_bytes)} of a GPU of {format_bytes(machine.gpu_memory_bytes)}"
    if method.host_bytes and method.host_bytes > machine.host_memory_bytes:
        return (
            f"took {format_bytes(method.host_bytes)} of {format_bytes(machine.host_memory_bytes)} of memory"
        )
    tokens = found.batch_size * found.seq_len * found.accumulation
    if method.tokens_per_s and method.step_s and method.tokens_per_s > 1.02 * tokens / min(method.step_s):
        return "has more tokens per second than its steps hold"
    return _too_good(found, method)


def _too_good(found: Submission, method: SharedMethod) -> str | None:
    cost = _cost(found, method)
    if cost is None or not method.step_s:
        return None
    flops_per_s = MOST_CPU_FLOPS if found.machine.gpu is None else MOST_FLOPS[found.dtype]
    floors = {
        "its FLOPs": cost.gpu_flops / flops_per_s,
        "its uploads": 0.0 if found.machine.gpu is None else cost.h2d_bytes / MOST_LINK_BYTES_PER_S,
    }
    for what, floor_s in floors.items():
        if min(method.step_s) < floor_s:
            step = format_seconds(min(method.step_s))
            return f"a step of {step} is shorter than {what} take anywhere, {format_seconds(floor_s)}"
    if found.machine.gpu is not None and method.gpu_bytes is not None:
        least = LEAST_OF_MEMORY * cost.peak_gpu_bytes
        if method.gpu_bytes < least:
            return f"took {format_bytes(method.gpu_bytes)} of GPU memory, where tensors alone take more"
    return None


def _cost(found: Submission, method: SharedMethod) -> Traffic | None:
    """`None` where the shape is not known here, or the settings are those of another version."""
    shape = _shape(found)
    if shape is None or found.dtype not in MOST_FLOPS:
        return None
    workload = Workload(
        batch_size=found.batch_size,
        seq_len=found.seq_len,
        accumulation=found.accumulation,
        dtype=found.dtype,  # type: ignore[arg-type]
        checkpointing=found.checkpointing,
    )
    try:
        return traffic(method.engine, shape, workload, parse_recorded(method.engine, method.settings))
    except (UserError, ValueError, TypeError):
        return None


def _shape(found: Submission) -> ModelShape | None:
    if found.model not in NAMED_SHAPES:
        return None
    source = ModelSource(name=found.model, random_weights=True, layers=found.layers)
    try:
        return shape_of_config(load_config(source), name=found.model, head="causal_lm", num_labels=0)
    except (UserError, ValueError):
        return None
