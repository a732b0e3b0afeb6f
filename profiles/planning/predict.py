"""Time and memory of a step, from what it asks of a machine and what the machine can do. Pure; no torch.

    layer time on a resource = amount / measured rate
    step time = the layers' times combined as the method overlaps them (`engines.costs.resources.overlap`)

`profiles.planning.layer_times` has the first line; here is the second, with its range: what times may be off
by is a named constant below with its source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from engines.costs.resources.overlap import STEP_TIME, LayerTimes, busy_s, held_back_s, serial_s
from engines.costs.resources.traffic import FUSED_ADAM_BYTES, LayerTraffic, Traffic
from engines.shapes import Direction, Workload
from profiles.machine import Figure, Machine
from profiles.planning.budget import host_bytes_without_gpu
from profiles.planning.layer_times import CPU_MATMUL_EFFICIENCY, launches_decide, resource_s, step_times
from profiles.planning.plan import Prediction
from profiles.rates import (
    Bound,
    FigureAbsent,
    cpu_adam,
    disk,
    from_gpu,
    half_threads_times,
    link_parts,
    matmul,
    memory_copy,
)
from profiles.units import format_elements, format_flops, format_rate

GPU_MODEL_ERROR = 1.3
"""Factor each way. Measured over predicted lies between 0.9 and 1.15 on the rows of one H200 that the
constants above were fitted to; another machine may be further off."""

LINK_ERROR, GPU_ERROR = 1.15, 1.2
"""Narrower factors for steps that the link, or the GPU's work, decides, by a profile of measured figures: all
9 and 33 of 36 published records of one H200 took what they say, and nine in ten must
(tests/profiles/planning/test_published_predictions.py). Another machine has had no such test."""

CPU_BESIDE_ERROR, LAUNCH_BESIDE_ERROR = 1.5, 1.8
"""Where the CPU updates weights beside the thread that starts the GPU's work: steps took up to 1.6 times what
is predicted where another job was on the machine; and where starting the work decides, nine in ten of ten
steps were within 1.4 (`tests/studies/prediction_ranges.py`), while one host of an H200 took 11 to 29 us to
start an operation in processes of half an hour."""

LAUNCH_ERROR = 1.5
"""A wider one where starting the work takes longer than doing it: a shared host starts it in 15 to 40 us. Not
where the probe has seen all speeds of its cores, which the range then has by itself: with what an operation
took in their own processes, nine in ten of 19 steps drawn by lot are within 30 %
(`tests/studies/prediction_grid_h200_second_afternoon`)."""

ALL_THREADS_TIMES = 1.2
"""Where the CPU updates weights on all of its threads, what the GPU's work takes at the least, over what it
takes by itself: those that start it wait for cores. 1.16 to 1.28 in five jobs of `exact-offload` on hosts of
H200s whose updates took about as long, and 1.03 to 1.05 in three whose updates took less."""

CPU_MODEL_ERROR = 2.0
"""Without a GPU operations are small and cores are shared, so the closed form is a guide only."""

WITHOUT_GPU = {"gpu": "compute", "h2d": "copies", "d2h": "copies"}
"""What the resources of a GPU and its link are where the CPU takes their part."""

COMPILE_S, COMPILE_LOW_S, COMPILE_HIGH_S = 10.0, 5.0, 60.0
"""What torch's compiler takes for one kind of block and the loss, once a process. 5 s were seen on an H200's
host with blocks of one kind (engines/EXPERIMENTS.md), up to a minute with several forms; records have
`compile_s`."""

_BOUNDS: tuple[Bound, ...] = ("low", "value", "high")
_DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h")


def predict(traffic: Traffic, machine: Machine, workload: Workload) -> Prediction:
    """Step time with its range, memory and bottleneck of `traffic` on `machine`.

    Without a GPU everything runs on the CPU's cores one after the other, and what a GPU would hold counts
    as host memory, beside a process without CUDA. Times are `None` if the profile lacks a figure that they
    rest on; `basis` names it.
    """
    on_gpu = machine.gpu is not None
    gpu_bytes, host_bytes = traffic.peak_gpu_bytes, traffic.peak_host_bytes
    if not on_gpu:
        gpu_bytes, host_bytes = 0, host_bytes_without_gpu(traffic)
    low = expected = high = None
    bottleneck = None
    try:
        times = {bound: step_times(traffic, machine, workload, bound) for bound in _BOUNDS}
    except FigureAbsent as error:
        basis = f"No step time: {error}."
    else:
        combine = _combining(traffic, machine)
        micro_batches = workload.accumulation
        expected = combine(times["value"], micro_batches)
        bottleneck = _bottleneck(busy_s(times["value"]), expected, traffic, micro_batches)
        error_factor = _model_error(traffic, machine, workload, bottleneck)
        low = combine(times["high"], micro_batches) / error_factor
        high = combine(times["low"], micro_batches) * error_factor
        if not on_gpu and bottleneck is not None:
            bottleneck = WITHOUT_GPU.get(bottleneck, bottleneck)
        basis = _basis(traffic, machine, workload, error_factor)
    return Prediction(
        step_s_low=low,
        step_s=expected,
        step_s_high=high,
        peak_gpu_bytes=gpu_bytes,
        peak_host_bytes=host_bytes,
        pinned_bytes=traffic.pinned_bytes if on_gpu else 0,
        h2d_bytes=traffic.h2d_bytes,
        d2h_bytes=traffic.d2h_bytes,
        forwards=traffic.forwards,
        bottleneck=bottleneck,
        basis=basis,
        disk_read_bytes=traffic.disk_bytes,
        floor_s=floor_s(traffic, machine, workload),
    )


def expected_step_s(traffic: Traffic, machine: Machine, workload: Workload) -> float | None:
    """`predict`'s expected seconds of a step, without what else it finds: planners compare many."""
    try:
        times = step_times(traffic, machine, workload, "value")
    except FigureAbsent:
        return None
    return _combining(traffic, machine)(times, workload.accumulation)


def _combining(traffic: Traffic, machine: Machine) -> Callable[[Sequence[LayerTimes], int], float]:
    """Seconds of a step, from its layers' and the number of micro-batches: with half of the CPU's threads for
    its updates, or with all, whichever are faster (`engines.cpu_updates.cpu_threads`)."""
    if machine.gpu is None:
        return serial_s
    combine = STEP_TIME[traffic.overlap]
    if traffic.overlap == "blockwise" and traffic.gradient_room < 1:
        combine = partial(_held_back_s, room=traffic.gradient_room)
    times = half_threads_times(machine, traffic) if traffic.cpu_adam_elements else 1.0
    return combine if times == 1.0 else partial(_with_threads_s, combine=combine, half_takes=times)


def _held_back_s(layers: Sequence[LayerTimes], micro_batches: int, room: float) -> float:
    return held_back_s(layers, room)


def _with_threads_s(
    layers: Sequence[LayerTimes],
    micro_batches: int,
    combine: Callable[[Sequence[LayerTimes], int], float],
    half_takes: float,
) -> float:
    in_the_way_s = min(ALL_THREADS_TIMES * busy_s(layers)["gpu"], serial_s(layers))
    with_all = max(combine(layers, micro_batches), in_the_way_s)
    with_half = [replace(each, cpu_s=half_takes * each.cpu_s) if each.cpu_s else each for each in layers]
    return min(with_all, combine(with_half, micro_batches))


def compiling_s(settings: Any, machine: Machine) -> float | None:
    """Seconds that compiling adds to the first steps with a method's typed `settings`; `None`: nothing is
    compiled."""
    compiled = machine.gpu is not None and getattr(settings, "compile", False) is not False
    return COMPILE_S if compiled else None


def floor_s(traffic: Traffic, machine: Machine, workload: Workload) -> float | None:
    """Seconds of a step whose slowest resource never waited; `None` if the profile lacks a figure for it.

    Adam on the CPU takes no less than the memory needs for what it reads and writes. What torch's Adam takes,
    by which its time is predicted, is no limit: on 32 cores it moved 78 GB/s and `lsp`'s 140.
    """
    adam_bytes = FUSED_ADAM_BYTES * traffic.cpu_adam_factor / traffic.cpu_adam_slowdown
    efficiency = CPU_MATMUL_EFFICIENCY if machine.gpu is None else 1.0
    least = LayerTraffic(
        name="least",
        gpu_forward_flops=efficiency * traffic.gpu_flops,  # at the rate of one large product
        h2d_bytes=traffic.h2d_bytes,
        host_bytes=adam_bytes * traffic.cpu_adam_elements,
        disk_bytes=traffic.disk_bytes,
        disk_write_bytes=traffic.disk_write_bytes,
        from_gpu_bytes=traffic.from_gpu_bytes,
    )
    busy = resource_s(replace(traffic, layers=(least,)), machine, workload)
    return None if busy is None else max(busy.values())


def _bottleneck(busy: dict[str, float], step_s: float, traffic: Traffic, micro_batches: int) -> str | None:
    """The busiest resource; where only the last of `micro_batches` has anything to update, the GPU counts
    with one. Host memory is named where it decides the step's time, or how long the updates take that do;
    otherwise it only does the work of copies and CPU, which have the name then."""
    host_s = busy["host memory"]
    if host_s > 0 and host_s >= step_s:
        return "host memory"
    others = {name: time_s for name, time_s in busy.items() if name != "host memory"}
    if traffic.overlap == "layerwise":
        others["gpu"] /= micro_batches
    if traffic.overlap in ("blockwise", "layerwise") and host_s > others["cpu"] > 0:
        others["host memory"] = host_s  # by which updates take as long
    name = max(others, key=lambda name: others[name])
    return name if others[name] > 0 else None


def _model_error(traffic: Traffic, machine: Machine, workload: Workload, bottleneck: str | None) -> float:
    """The factor each way by which the closed form may be off, by what the step's time rests on."""
    if machine.gpu is None:
        return CPU_MODEL_ERROR
    starting_decides = launches_decide(traffic, machine, workload)
    if traffic.cpu_adam_elements:
        return LAUNCH_BESIDE_ERROR if starting_decides and bottleneck == "gpu" else CPU_BESIDE_ERROR
    if starting_decides:
        is_known = bottleneck != "gpu" or machine.cpu.python_turn_s.value is not None
        return GPU_MODEL_ERROR if is_known else LAUNCH_ERROR
    if machine.gpu.copy_bytes_per_s.origin != "measured":
        return GPU_MODEL_ERROR
    if bottleneck in _DIRECTIONS:
        return LINK_ERROR
    return GPU_ERROR if bottleneck == "gpu" else GPU_MODEL_ERROR


def _basis(traffic: Traffic, machine: Machine, workload: Workload, error: float) -> str:
    """One sentence: the figures, their origin, and the model's own error."""
    on_gpu = machine.gpu is not None
    parts = []
    if traffic.gpu_flops > 0:
        rate = _named_figure(matmul(machine, workload), format_flops)
        parts.append(rate if on_gpu else f"{rate}, of which a model gets {CPU_MATMUL_EFFICIENCY:.0%}")
    if traffic.gpu_bytes > 0:
        parts.append(_named_figure(memory_copy(machine), format_rate))
    if on_gpu:
        for direction in _DIRECTIONS:
            figures = link_parts(machine, traffic, direction)
            parts += [_named_figure((name, figure), format_rate) for _, name, figure in figures]
        if traffic.from_gpu_bytes:
            parts.append(_named_figure(from_gpu(traffic, machine), format_rate))
    if traffic.cpu_adam_elements:
        adam = cpu_adam(machine, traffic)[0]
        of_memory = adam[1] is machine.memory.copy_bytes_per_s
        parts.append(_named_figure(adam, format_rate if of_memory else format_elements))
    if traffic.disk_bytes:
        parts.append(_named_figure(disk(machine), format_rate))
    if traffic.disk_write_bytes:
        parts.append(_named_figure(disk(machine, writes=True), format_rate))
    overlap = traffic.overlap.replace("_", " ") if on_gpu else "everything in turn on the CPU"
    resources = "; ".join(parts) or "no resource used"
    return f"Closed form, {overlap}: {resources}; model error a factor of {error:g} each way."


def _named_figure(named: tuple[str, Figure], formatted: Callable[[float | None], str]) -> str:
    name, figure = named
    disturbed = f", disturbed: {figure.disturbance}" if figure.disturbance else ""
    return f"{name} {formatted(figure.value)} ({figure.origin}{disturbed})"
