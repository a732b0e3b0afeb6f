"""Time of each layer of a step on each resource of a machine. Pure; no torch.

    layer time on a resource = amount / measured rate

Rates are the machine's own figures (`profiles.rates`). What no probe measures is a named constant below with
its source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engines.costs.resources.overlap import LayerTimes, busy_s
from engines.costs.resources.traffic import SWITCH_INTERVAL_S, LayerTraffic, Traffic
from engines.costs.transformer import STEP_LAUNCHES
from engines.shapes import Workload
from profiles.machine import Figure, Machine
from profiles.rates import (
    FORWARD_LAUNCH_S,
    Bound,
    FigureAbsent,
    cpu_adam,
    disk,
    from_gpu,
    host_copy,
    host_memory_rate,
    is_hopper,
    launch_time,
    link_byte_s,
    matmul,
    memory_copy,
    off_grid_times,
    rate_of,
)

CPU_MATMUL_EFFICIENCY = 0.7
"""Rate of a model's matrix products on a CPU over that of one large product: attention and small products
weigh more. Assumed, not measured."""

AUTOGRAD_TIMES = 1.3
"""What an operation takes with autograd over what it takes without, at most: 1.09 to 1.27 by six probes of
H200s' hosts that took the quickest of each window, 1.1 on a CPU. Probes before those took middle samples of
each by itself, and found up to 3.0, where steps were as with 1.3: they were disturbed."""

LAUNCH_S = AUTOGRAD_TIMES * FORWARD_LAUNCH_S
"""Time the CPU needs to start one operation of a model in eager PyTorch, Hugging Face's Python and autograd
included, where the profile does not say it. Native's eager blocks that run again took 0.152 to 0.178 s at
1.3B, of which 0.151 are predicted with it."""

PRODUCT_S = 3.2e-6
"""What a matrix product takes beside its operations at the rate of a large one: the GPU fills and drains, and
its last row of tiles leaves a part of it idle. Where the profile does not say it; one H200's."""

GRAPH_KERNEL_S, KERNEL_WORKS_S = 0.9e-6, 1.4e-6
"""Time from a kernel of a CUDA graph to the next where neither has work, if the profile does not say it, and
what filling and draining the GPU adds. Compiled kernels that the CPU has started ahead take no less. The
second is estimated: captured steps of 12 to 36 blocks took 0.04 to 0.09 ms a block longer without it
(`tests/studies/prediction_grid_h200`)."""

TRITON_LAUNCH_S, OWN_LAUNCH_SHARE = 30e-6, 0.4
"""Time the CPU needs to start a Triton kernel by Triton's own Python, where the profile does not say it
(estimated), and what engines' own way takes of that (`engines.kernels.triton_launch`)."""

GAUSSIAN_BYTES = 6
"""Drawing one normal number on a GPU takes as long as moving this many bytes: 0.9 ms for 629 M numbers at
4.1 TB/s (H200, four numbers per Philox call, the memory traffic of the same kernel taken off)."""

CPU_GAUSSIAN_S = 35e-9
"""Perturbing by one normal number on a CPU, by torch operations on pieces too small for a second thread:
33 to 39 ns on a server core."""

LAUNCHES_DECIDE = 0.8
"""Time to start a step's work over the GPU's time for it, from which the first decides."""

_OPPOSITE: dict[Bound, Bound] = {"low": "high", "value": "value", "high": "low"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """Seconds per unit of each resource; only those that the traffic needs are looked up."""

    per_flop_s: float
    off_grid_times: float
    attention_is_slow: bool
    per_product_s: float
    per_kernel_s: float
    per_gpu_byte_s: float
    per_gaussian_s: float
    per_h2d_byte_s: float
    per_d2h_byte_s: float
    per_adam_element_s: float
    per_chunk_s: float
    per_host_byte_s: float
    per_disk_byte_s: float
    per_disk_written_byte_s: float
    per_from_gpu_byte_s: float


def step_times(traffic: Traffic, machine: Machine, workload: Workload, bound: Bound) -> list[LayerTimes]:
    """Of its layers, and of what comes between two steps. Raises `FigureAbsent`."""
    return _with_pause(_layer_times(traffic, machine, workload, bound), traffic, machine, bound)


def resource_s(traffic: Traffic, machine: Machine, workload: Workload) -> dict[str, float] | None:
    """Seconds each resource is busy in a step, expected; `None` if the profile lacks a figure for it."""
    try:
        return busy_s(_layer_times(traffic, machine, workload, "value"))
    except FigureAbsent:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuParts:
    """What the GPU's seconds of a step are made of."""

    products_s: float
    """Of matrix products, at the rate of a large one."""
    between_s: float
    """Of what lies between them, and of products that are not large."""
    starting_s: float
    """In which it waits for operations that the CPU has not started yet."""


def gpu_parts(traffic: Traffic, machine: Machine, workload: Workload) -> GpuParts | None:
    """They add up to `resource_s`' GPU; `None` if the profile lacks a figure for it."""
    try:
        rates = _rates(traffic, machine, workload, "value")
        whole_s = busy_s(_layer_times(traffic, machine, workload, "value"))["gpu"]
    except FigureAbsent:
        return None
    products_s = traffic.gpu_flops * rates.per_flop_s
    work_s = sum(each.gpu_s for each in _times(traffic.layers, rates))
    return GpuParts(
        products_s=products_s, between_s=work_s - products_s, starting_s=max(0.0, whole_s - work_s)
    )


def launches_decide(traffic: Traffic, machine: Machine, workload: Workload) -> bool:
    """Whether starting a step's work takes about as long as the GPU needs for it. Raises `FigureAbsent`."""
    rates = _rates(traffic, machine, workload, "value")
    work_s = sum(each.gpu_s for each in _times(traffic.layers, rates))
    return sum(_launches_s(traffic, machine, "value")) > LAUNCHES_DECIDE * work_s


def _layer_times(traffic: Traffic, machine: Machine, workload: Workload, bound: Bound) -> list[LayerTimes]:
    """Raises `FigureAbsent`."""
    rates = _rates(traffic, machine, workload, bound)
    times = _times(traffic.layers, rates)
    launches = _launches_s(traffic, machine, bound)
    updates = [layer.update_gpu_bytes * rates.per_gpu_byte_s for layer in traffic.layers]
    times = _with_launches(times, launches, updates, hides_launches=machine.gpu is not None)
    each_s = _forward_launch_s(machine, bound)
    waited = [each_s * layer.waited_launches for layer in traffic.layers]
    return [
        replace(each, gpu_s=each.gpu_s + more) if more else each
        for each, more in zip(times, waited, strict=True)
    ]


def _with_pause(
    times: list[LayerTimes], traffic: Traffic, machine: Machine, bound: Bound
) -> list[LayerTimes]:
    """With what a GPU that computes waits between two steps, as the first layer's."""
    if machine.gpu is None or traffic.gpu_flops == 0:
        return times
    first, *rest = times
    pause_s = STEP_LAUNCHES * _forward_launch_s(machine, bound)
    return [replace(first, gpu_s=first.gpu_s + pause_s), *rest]


def _launches_s(traffic: Traffic, machine: Machine, bound: Bound) -> list[float]:
    """Seconds that starting each layer's work takes the CPU."""
    eager_s, python_s = _launch_s(traffic, machine, bound), _forward_launch_s(machine, bound)
    of_triton = _seconds(launch_time(machine, machine.cpu.triton_launch_s), TRITON_LAUNCH_S, bound)
    triton_s = OWN_LAUNCH_SHARE * of_triton
    return [
        layer.launches * eager_s
        + layer.python_launches * python_s
        + layer.triton_launches * triton_s
        + layer.gathering_s
        for layer in traffic.layers
    ]


def _launch_s(traffic: Traffic, machine: Machine, bound: Bound) -> float:
    """Seconds that starting one operation takes, with autograd where there is a backward pass."""
    if all(layer.gpu_backward_flops == 0 for layer in traffic.layers):
        return _forward_launch_s(machine, bound)
    with_autograd = _seconds(launch_time(machine, machine.cpu.training_launch_s), LAUNCH_S, bound)
    if machine.cpu.forward_launch_s.value and machine.cpu.training_launch_s.value:
        return min(with_autograd, AUTOGRAD_TIMES * _forward_launch_s(machine, bound))
    return with_autograd


def _forward_launch_s(machine: Machine, bound: Bound) -> float:
    """Seconds that starting one operation takes without autograd."""
    return _seconds(launch_time(machine, machine.cpu.forward_launch_s), FORWARD_LAUNCH_S, bound)


def _seconds(figure: Figure, otherwise_s: float, bound: Bound) -> float:
    """A time and no rate: the low bound of a rate is the high one of a time."""
    return otherwise_s if not figure.value else rate_of("time of an operation", figure, _OPPOSITE[bound])


def _with_launches(
    times: list[LayerTimes], launches: list[float], updates: list[float], *, hides_launches: bool
) -> list[LayerTimes]:
    """GPU times with the time that the CPU needs to start the work.

    A GPU works while the CPU starts what comes next, and the CPU runs ahead over the whole step: what it
    waits for, such as the update of a block, the GPU waits for too. Of the GPU's work, `updates` (seconds)
    are of an optimizer that comes when all has been started. A CPU does one after the other.
    """
    if not hides_launches:
        return [_longer(each, each.gpu_s + launch) for each, launch in zip(times, launches, strict=True)]
    work, starting = sum(each.gpu_s for each in times) - sum(updates), sum(launches)
    if starting <= work:
        return times
    if work <= 0:
        own = zip(launches, updates, times, strict=True)
        return [_longer(each, launch + update) for launch, update, each in own]
    return [
        _longer(each, (each.gpu_s - update) * starting / work + update)
        for each, update in zip(times, updates, strict=True)
    ]


def _longer(times: LayerTimes, gpu_s: float) -> LayerTimes:
    """With `gpu_s`, of which the backward pass has its share."""
    share = times.backward_s / times.gpu_s if times.gpu_s > 0 else 0.0
    return replace(times, gpu_s=gpu_s, backward_s=share * gpu_s)


def _times(layers: Sequence[LayerTraffic], rates: _Rates) -> list[LayerTimes]:
    """Of the work alone, launches left out; made once of layers that differ in their names alone."""
    found: dict[tuple[object, ...], LayerTimes] = {}
    kinds = [layer[1:] for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind not in found:
            found[kind] = _times_of(layer, rates)
    return [found[kind] for kind in kinds]


def _times_of(layer: LayerTraffic, rates: _Rates) -> LayerTimes:
    flops = layer.gpu_forward_flops + layer.gpu_backward_flops
    off_grid = layer.off_grid_flops * (rates.off_grid_times - 1)
    longer = layer.attention_longer_flops * rates.attention_is_slow
    work = (
        (flops + off_grid + longer) * rates.per_flop_s
        + layer.gpu_bytes * rates.per_gpu_byte_s
        + layer.gaussians * rates.per_gaussian_s
        + layer.products * rates.per_product_s
        + layer.kernels * rates.per_kernel_s
        + layer.unrated_s
    )
    return LayerTimes(
        gpu_s=work,
        backward_s=work * layer.gpu_backward_flops / flops if flops else 0.0,
        h2d_s=layer.h2d_bytes * rates.per_h2d_byte_s,
        d2h_s=layer.d2h_bytes * rates.per_d2h_byte_s,
        cpu_s=layer.cpu_adam_elements * rates.per_adam_element_s,
        host_s=layer.host_bytes * rates.per_host_byte_s,
        update_host_s=layer.update_bytes * rates.per_host_byte_s,
        between_updates_s=layer.cpu_chunks * rates.per_chunk_s,
        # A disk that reads and writes does one after the other, or each at half its rate.
        disk_s=layer.disk_bytes * rates.per_disk_byte_s
        + layer.disk_write_bytes * rates.per_disk_written_byte_s,
        from_gpu_s=layer.from_gpu_bytes * rates.per_from_gpu_byte_s,
    )


def _rates(traffic: Traffic, machine: Machine, workload: Workload, bound: Bound) -> _Rates:
    def per(amount: float, figure: Callable[[], tuple[str, Figure]], factor: float = 1.0) -> float:
        return factor / rate_of(*figure(), bound) if amount > 0 else 0.0

    host_byte_s = per(traffic.host_bytes, lambda: host_memory_rate(machine))
    gaussians = sum(layer.gaussians for layer in traffic.layers)
    memory_byte_s = per(traffic.gpu_bytes + gaussians, lambda: memory_copy(machine))
    product_s = kernel_s = 0.0
    if machine.gpu is not None:
        product_s = _seconds(machine.gpu.product_s, PRODUCT_S, bound)
        kernel_s = KERNEL_WORKS_S + _seconds(machine.cpu.graph_launch_s, GRAPH_KERNEL_S, bound)
    if machine.gpu is None:
        efficiency, gaussian_s = CPU_MATMUL_EFFICIENCY, CPU_GAUSSIAN_S
        # Copies that stay on the host: each byte of the link is read and written.
        up = down = per(traffic.h2d_bytes + traffic.d2h_bytes, lambda: host_copy(machine), 2.0)
    else:
        # A large product's rate under lasting load; what small ones lose is counted by product.
        efficiency, gaussian_s = 1.0, GAUSSIAN_BYTES * memory_byte_s
        up = link_byte_s(machine, traffic, "h2d", bound)
        down = link_byte_s(machine, traffic, "d2h", bound)
    adam_factor = cpu_adam(machine, traffic)[1]
    return _Rates(
        per_flop_s=per(traffic.gpu_flops, lambda: matmul(machine, workload), 1 / efficiency),
        off_grid_times=off_grid_times(machine),
        attention_is_slow=is_hopper(machine),
        per_product_s=product_s,
        per_kernel_s=kernel_s,
        per_gpu_byte_s=memory_byte_s,
        per_gaussian_s=gaussian_s,
        per_h2d_byte_s=up,
        per_d2h_byte_s=down,
        per_adam_element_s=per(traffic.cpu_adam_elements, lambda: cpu_adam(machine, traffic)[0], adam_factor),
        # Without a GPU there is nobody beside it.
        per_chunk_s=SWITCH_INTERVAL_S if machine.gpu is not None else 0.0,
        per_host_byte_s=host_byte_s,
        per_disk_byte_s=per(traffic.disk_bytes, lambda: disk(machine)),
        per_disk_written_byte_s=per(traffic.disk_write_bytes, lambda: disk(machine, writes=True)),
        per_from_gpu_byte_s=0.0
        if machine.gpu is None
        else per(traffic.from_gpu_bytes, lambda: from_gpu(traffic, machine)),
    )
