"""The machine as measured: every number with its origin. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from profiles.documents import read_document, to_json, write_whole

SCHEMA_VERSION = 1
"""1: first version (0.1.0)."""

Origin = Literal["measured", "datasheet", "absent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number and where it comes from. The unit is in the name of the field that holds it."""

    value: float | None
    """`None` exactly when `origin` is `absent`."""
    origin: Origin
    method: str
    """How it was measured, the datasheet's title, or why it is absent."""
    time: str | None = None
    """When it was measured, ISO 8601 in UTC."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest sample; `value` is the median."""
    count: int = 0
    """Samples."""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.origin == "absent"):
            raise ValueError(f"a figure of origin {self.origin} has the value {self.value}")


def absent(reason: str) -> Figure:
    """A figure that could not be had, and why."""
    return Figure(value=None, origin="absent", method=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int
    driver: str | None
    compute_capability: str | None
    """Such as `9.0`."""
    num_gpus: int
    copy_bytes_per_s: Figure
    """Device memory bandwidth of a large copy, bytes read plus bytes written."""
    matmul_bf16_flops: Figure
    matmul_fp16_flops: Figure
    matmul_fp32_flops: Figure
    """Matrix product rates in FLOP/s on normally distributed data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Between host and GPU. Rates in bytes per second."""

    generation_max: int | None
    generation_loaded: int | None
    width_max: int | None
    width_loaded: int | None
    """PCI Express generation and lanes: what device and slot can do, and what ran under load."""
    h2d_pinned_bytes_per_s: Figure
    d2h_pinned_bytes_per_s: Figure
    h2d_pageable_bytes_per_s: Figure
    d2h_pageable_bytes_per_s: Figure
    h2d_duplex_bytes_per_s: Figure
    d2h_duplex_bytes_per_s: Figure
    """Each direction while the other is busy too, pinned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    name: str
    cores_usable: int
    """Cores that this process may use."""
    cores_basis: str
    """What decided it, such as `cgroup quota 2.0 of 16 cores`."""
    cores_total: int
    threads: int
    """Threads that the measurements below used."""
    matmul_fp32_flops: Figure
    matmul_bf16_flops: Figure
    adam_elements_per_s: Figure
    """Fused AdamW in fp32 on tensors larger than the caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    total_bytes: int
    """As this process may use it: the smaller of the machine's memory and the cgroup's limit."""
    available_bytes: int
    total_basis: str
    swap_bytes: int
    copy_bytes_per_s: Figure
    """Bandwidth of a large copy, bytes read plus bytes written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    name: str
    """Short, without the host's name: GPU and CPU."""
    time: str
    """When the probe ran, ISO 8601 in UTC."""
    gpu: Gpu | None
    gpu_absent_reason: str | None
    link: Link | None
    cpu: Cpu
    memory: HostMemory
    platform: str
    """Kernel and, where it is one, 'WSL2'."""
    versions: dict[str, str]
    """python, torch, cuda, ... as the probe found them."""
    schema_version: int = SCHEMA_VERSION


def load_machine(path: Path) -> Machine:
    """Raises `UserError` if `path` is not a machine profile that this version reads."""
    return read_document(path, Machine, SCHEMA_VERSION, "machine profile")


def save_machine(machine: Machine, path: Path) -> None:
    """Raises `UserError` if `path` cannot be written."""
    write_whole(path, to_json(machine))
