"""A machine with round numbers, as a probe would have measured it."""

from __future__ import annotations

from profiles.machine import Cpu, Figure, Gpu, HostMemory, LinkFigures, Machine, absent

TIME = "2026-01-02T03:04:05+00:00"


def figure(value: float) -> Figure:
    return Figure(
        value=value,
        origin="measured",
        method="five copies",
        time=TIME,
        low=0.9 * value,
        high=1.1 * value,
        count=5,
    )


def make_machine(*, gpu: bool = True) -> Machine:
    """A 24 GiB GPU on PCIe 4 x8 of x16, eight of sixteen cores, 64 GiB of memory; or without the GPU."""
    return Machine(
        name="Fake GPU, Fake CPU" if gpu else "no GPU, Fake CPU",
        time=TIME,
        gpu=Gpu(
            name="Fake GPU [24G]",
            total_bytes=24 * 2**30,
            free_bytes=22 * 2**30,
            driver="570.1",
            compute_capability="8.9",
            num_gpus=2,
            copy_bytes_per_s=figure(900e9),
            matmul_bf16_flops=figure(150e12),
            matmul_fp16_flops=figure(160e12),
            matmul_fp32_flops=absent("OutOfMemoryError: CUDA out of memory"),
        )
        if gpu
        else None,
        gpu_absent_reason=None if gpu else "NVML does not start (Driver Not Loaded)",
        link=LinkFigures(
            generation_max=4,
            generation_loaded=4,
            width_max=16,
            width_loaded=8,
            h2d_pinned_bytes_per_s=figure(13e9),
            d2h_pinned_bytes_per_s=figure(12e9),
            h2d_pageable_bytes_per_s=figure(6e9),
            d2h_pageable_bytes_per_s=figure(5e9),
            h2d_duplex_bytes_per_s=figure(10e9),
            d2h_duplex_bytes_per_s=figure(9e9),
        )
        if gpu
        else None,
        cpu=Cpu(
            name="Fake CPU",
            cores_usable=8,
            cores_basis="cgroup quota 8.0 of 16 cores",
            cores_total=16,
            threads=8,
            matmul_fp32_flops=figure(500e9),
            matmul_bf16_flops=figure(1e12),
            adam_elements_per_s=figure(1e9),
        ),
        memory=HostMemory(
            total_bytes=64 * 2**30,
            available_bytes=60 * 2**30,
            total_basis="all 64.0 GiB",
            swap_bytes=0,
            copy_bytes_per_s=figure(40e9),
        ),
        platform="Linux 6.1 x86_64",
        versions={"python": "3.11.7", "torch": "2.13.0"},
    )
