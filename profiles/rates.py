"""Which figure of a machine stands for what a step asks of it. Pure; no torch.

Each is told with the name that plans use of it; `FigureAbsent` says which one a profile lacks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from engines.costs.resources.traffic import ADAMW_KERNEL_BYTES, FUSED_ADAM_BYTES, SPARE_THREADS, Traffic
from engines.shapes import Direction, Workload
from profiles.machine import Figure, Gpu, Machine

COPY_WRITE_ALLOCATE = 1.5
"""Host memory traffic over what a copy counts (read plus written): a CPU reads a line before it writes it.
DMA does not, so 74 GB/s of copies leave room for 111 GB/s. An H200 machine streams 49 GB/s each way."""

THREAD_BYTES_PER_S = 11e9
"""What one thread of the CPU moves in updates where so few run that memory is not busy: 8.8 to 11.5 GB/s in
fourteen jobs of `lsp` and `exact-offload` with 7 to 11 threads on hosts of H200s."""

FORWARD_LAUNCH_S = 15e-6
"""Time the CPU needs to start one operation of a model where autograd is off, in methods with forward passes
only, where the profile does not say it: the quickest samples of the probe on two H200s' hosts were 15.5 and
13.9 us."""

HOPPER = 9
"""Major version of CUDA's compute capability."""

Bound = Literal["low", "value", "high"]


class FigureAbsent(Exception):
    """A figure that the prediction needs is not there."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")


def rate_of(name: str, figure: Figure, bound: Bound) -> float:
    """Raises `FigureAbsent` for a figure that is absent or not positive."""
    if figure.value is None or figure.value <= 0:
        raise FigureAbsent(f"{name} is not in the machine profile", figure.method)
    if bound == "low" and figure.low is not None and figure.low > 0:
        return min(figure.low, figure.value)
    if bound == "high" and figure.high is not None:
        return max(figure.high, figure.value)
    return figure.value


def cpu_adam(machine: Machine, traffic: Traffic) -> tuple[tuple[str, Figure], float]:
    """The CPU's AdamW that was measured and is nearest to what runs, and what runs takes of its time."""
    own, torchs = machine.cpu.adamw_kernel_elements_per_s, machine.cpu.adam_elements_per_s
    if traffic.cpu_adamw_kernel_factor is None:
        return ("CPU Adam", torchs), traffic.cpu_adam_factor
    if own.value is not None:
        return ("AdamW kernel on the CPU", own), traffic.cpu_adamw_kernel_factor
    # Not measured: no slower than torch's, and with many cores no slower than memory is. On 32 cores torch's
    # moved 78 GB/s and the kernel 151, which are half as much again as the copies' 101.
    copy = machine.memory.copy_bytes_per_s
    moved = ADAMW_KERNEL_BYTES * traffic.cpu_adamw_kernel_factor / COPY_WRITE_ALLOCATE
    if not traffic.is_adamw_kernel or copy.origin != "measured" or not (torchs.value and copy.value):
        return ("CPU Adam", torchs), traffic.cpu_adam_factor
    if copy.value / moved > torchs.value / traffic.cpu_adam_factor:
        return ("host copy bandwidth", copy), moved
    return ("CPU Adam", torchs), traffic.cpu_adam_factor


def half_threads_times(machine: Machine, traffic: Traffic) -> float:
    """What updates take with half of the CPU's threads over what they take with all, by which it was probed
    (`engines.cpu_updates.cpu_threads`). 1 where code of others updates, with all that there are."""
    if traffic.cpu_adamw_kernel_factor is None or traffic.overlap == "serial":
        return 1.0
    (_, elements_per_s), times = cpu_adam(machine, traffic)
    if elements_per_s.value is None:
        return 1.0
    half = max(1, (machine.cpu.cores_usable - SPARE_THREADS) // 2)
    moved = ADAMW_KERNEL_BYTES * traffic.cpu_adamw_kernel_factor
    return max(1.0, elements_per_s.value / times * moved / (half * THREAD_BYTES_PER_S))


def host_copy(machine: Machine) -> tuple[str, Figure]:
    return "host copy bandwidth", machine.memory.copy_bytes_per_s


def host_memory_rate(machine: Machine) -> tuple[str, Figure]:
    """What host memory moves: what a copy makes of it, or AdamW where that is more."""
    name, copy = host_copy(machine)
    if copy.value is None:
        return name, copy
    rates = [
        copy.scaled(COPY_WRITE_ALLOCATE),
        machine.cpu.adam_elements_per_s.scaled(FUSED_ADAM_BYTES),
        machine.cpu.adamw_kernel_elements_per_s.scaled(ADAMW_KERNEL_BYTES),
    ]
    return name, max(rates, key=lambda each: each.value or 0.0)


def disk(machine: Machine, *, writes: bool = False) -> tuple[str, Figure]:
    if machine.disk is None:
        why = machine.disk_absent_reason or "the profile holds no disk"
        why += "; 'lspzo-bench probe --disk FOLDER --out FILE' does, for --profile FILE"
        raise FigureAbsent("disk read bandwidth is not in the machine profile", why)
    if writes:
        return "disk write bandwidth", machine.disk.write_bytes_per_s
    return "disk read bandwidth", machine.disk.read_bytes_per_s


BETWEEN_GPUS = "bandwidth between GPUs"
"""What is measured."""


def from_gpu(traffic: Traffic, machine: Machine) -> tuple[str, Figure]:
    """Of the slowest GPU; for weights that GPUs divide, where the profile is of one alone, that of its link,
    which is what two GPUs have at least."""
    each = () if machine.link is None else machine.link.each_gpu
    known = [gpu.from_gpu_bytes_per_s for gpu in each if gpu.from_gpu_bytes_per_s.value]
    if not known and traffic.divided_weights and machine.link is not None and not each:
        return "bandwidth between GPUs, taken for that of the link", machine.link.d2h_pinned_bytes_per_s
    if not known:
        why = each[0].from_gpu_bytes_per_s.method if each else "the profile is of one GPU"
        raise FigureAbsent("bandwidth between GPUs is not in the machine profile", why)
    return BETWEEN_GPUS, min(known, key=lambda figure: figure.value or 0.0)


def memory_copy(machine: Machine) -> tuple[str, Figure]:
    if machine.gpu is None:
        return host_copy(machine)
    return "GPU copy bandwidth", machine.gpu.copy_bytes_per_s


def launch_time(machine: Machine, figure: Figure) -> Figure:
    """What starting an operation takes, `figure` of the CPU of `machine`: over windows, which saw its cores
    at every speed that they ran at. What a plain loop took in these says how far apart the speeds are, since
    operations take as many times longer and each window's quickest tells of the faster one. Of a profile
    without windows, the quickest sample: the time of a CPU that nobody disturbs. Two H200s' hosts agree,
    15.5 and 13.9 us without autograd, where the middle ones were 28 and 14; steps took as long on both."""
    turn = machine.cpu.python_turn_s
    if figure.value is None or figure.low is None:
        return figure
    if turn.value is None:
        return replace(figure, value=figure.low, high=figure.value)
    if turn.low is None or turn.high is None:
        return figure
    return replace(
        figure,
        low=min(figure.low, figure.value * turn.low / turn.value),
        high=max(figure.high or figure.value, figure.value * turn.high / turn.value),
    )


def with_launches_of(machine: Machine, forward_s: float) -> Machine:
    """`machine` whose CPU takes `forward_s` to start an operation without autograd, as a run of it found, and
    as many times longer or shorter for its other operations."""
    expected = launch_time(machine, machine.cpu.forward_launch_s)
    times = forward_s / (expected.value or FORWARD_LAUNCH_S)
    cpu = machine.cpu

    def taken(figure: Figure) -> Figure:
        of_now = launch_time(machine, figure)
        return replace(of_now, low=None, high=None).scaled(times, "at the speed of a run")

    return replace(
        machine,
        cpu=replace(
            cpu,
            forward_launch_s=Figure(value=forward_s, origin="measured", method="as a run found"),
            training_launch_s=taken(cpu.training_launch_s),
            triton_launch_s=taken(cpu.triton_launch_s),
        ),
    )


def matmul(machine: Machine, workload: Workload) -> tuple[str, Figure]:
    if machine.gpu is None:
        cpu = {"fp32": machine.cpu.matmul_fp32_flops, "bf16": machine.cpu.matmul_bf16_flops}
        if workload.dtype not in cpu:
            raise FigureAbsent(f"CPU matrix product in {workload.dtype}", "it is not probed")
        return f"CPU matrix product in {workload.dtype}", cpu[workload.dtype]
    gpu = {
        "fp32": machine.gpu.matmul_fp32_flops,
        "bf16": _sustained(machine.gpu.matmul_bf16_flops, machine.gpu),
        "fp16": _sustained(machine.gpu.matmul_fp16_flops, machine.gpu),
    }
    return f"GPU matrix product in {workload.dtype}", gpu[workload.dtype]


def off_grid_times(machine: Machine) -> float:
    """Time of a 16-bit product whose rows begin off the grid of 16 bytes, over that of one on it: 6 on a
    Hopper GPU, whose head of GPT-2 (50257 tokens) took 15 ms more than the 3 ms of 16 x 512 tokens
    (`tests/studies/prediction_grid_h200_night`, one job). Taken for 2 on older ones: on an A100 GPT-2 is said
    to train a quarter faster with 50304. On a CPU and in other formats none is known."""
    if machine.gpu is None or machine.gpu.compute_capability is None:
        return 1.0
    return 6.0 if is_hopper(machine) else 2.0


def is_hopper(machine: Machine) -> bool:
    """A Hopper GPU or a later one: its products have become faster than what lies between them."""
    capability = None if machine.gpu is None else machine.gpu.compute_capability
    return capability is not None and int(capability.partition(".")[0]) >= HOPPER


def measured_matrix_rate(machine: Machine, workload: Workload) -> float | None:
    """FLOP/s of one large product in the job's precision, under lasting load, as this machine's profile has
    measured it; `None`: it was not measured, or on cores that others used."""
    try:
        _, figure = matmul(machine, workload)
    except FigureAbsent:
        return None
    if machine.gpu is None and figure.disturbance is not None:
        return None
    return figure.value if figure.origin == "measured" else None


def _sustained(product: Figure, gpu: Gpu) -> Figure:
    """What is left of a burst's rate under lasting load, which a training run is; as it was in bf16."""
    sustained, burst = gpu.matmul_sustained_flops.value, gpu.matmul_bf16_flops.value
    if product.value is None or not sustained or not burst or sustained >= burst:
        return product
    return product.scaled(sustained / burst)


def link_byte_s(machine: Machine, traffic: Traffic, direction: Direction, bound: Bound) -> float:
    """Seconds per byte of one direction, its two parts taken together."""
    parts = link_parts(machine, traffic, direction)
    moved = sum(count for count, _, _ in parts)
    return (
        sum(count / rate_of(name, figure, bound) for count, name, figure in parts) / moved if moved else 0.0
    )


def link_parts(machine: Machine, traffic: Traffic, direction: Direction) -> list[tuple[int, str, Figure]]:
    """What goes in one direction, in parts: bytes, the name of their rate, the rate.

    Where copies in both directions run side by side, as many bytes as the lighter one has are slowed down by
    the other direction's; the rest of the heavier one has the link to itself.
    """
    link = machine.link
    own, other = traffic.h2d_bytes, traffic.d2h_bytes
    alone, shared = "h2d_pinned_bytes_per_s", "h2d_duplex_bytes_per_s"
    if direction == "d2h":
        own, other = other, own
        alone, shared = "d2h_pinned_bytes_per_s", "d2h_duplex_bytes_per_s"
    beside = min(own, other) if traffic.overlap in ("streamed", "layerwise", "blockwise") else 0
    counts = {shared: beside, alone: own - beside}
    names = {
        shared: f"{direction} bandwidth with both directions busy",
        alone: f"{direction} pinned bandwidth",
    }
    if own and link is None:
        raise FigureAbsent(
            "link bandwidth is not in the machine profile", "the profile has a GPU but no link"
        )
    return [(count, names[key], getattr(link, key)) for key, count in counts.items() if count]
