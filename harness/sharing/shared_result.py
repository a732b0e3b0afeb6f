"""What a shared result holds: numbers of a machine, a job and its methods. No paths, no names of a user."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import ConfigDict, Field

SUBMISSION_VERSION = 1
OWN_MODEL = "own model"
"""Stands for a model that is no named shape: its name may be the user's."""
TEXT = re.compile(r"[\w .,()@+:=%'-]{1,100}", re.ASCII)
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_FILLING = re.compile(
    r"\((?:r|tm|c)\)|\b(?:nvidia|geforce|intel|amd|cpu|gpu|processor|with.*|@.*)\b", re.IGNORECASE
)
"""Of names of hardware, what tells no two apart."""

Setting = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMachine:
    __pydantic_config__ = ConfigDict(extra="forbid")

    gpu: str | None
    """As NVML names it; `None`: there is none."""
    gpu_memory_bytes: int | None
    link: str | None
    cpu: str
    cores: int
    host_memory_bytes: int

    @property
    def slug(self) -> str:
        """Its folder's name, made of what NVML and the CPU say: one spelling for a machine."""
        gpu = "no-gpu" if self.gpu is None else _dashed(self.gpu)
        if self.gpu_memory_bytes:
            gpu += f"-{round(self.gpu_memory_bytes / 2**30)}gib"
        return f"{gpu}_{_dashed(self.cpu)}-{self.cores}c_{round(self.host_memory_bytes / 2**30)}gib"


def _dashed(name: str) -> str:
    words = re.sub(r"[^a-z0-9.]+", "-", _FILLING.sub(" ", name.lower())).strip("-.")
    return words or "unnamed"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMethod:
    """One method, over all its processes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    engine: str
    settings: dict[str, Setting]
    runs: int
    step_s: tuple[float, ...]
    """Median of each process that ended well; empty: none did."""
    tokens_per_s: float | None
    gpu_bytes: int | None
    host_bytes: int | None
    predicted_step_s: float | None
    energy_j: float | None = None

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.step_s) if self.step_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What one comparison measured."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    day: str
    machine: SharedMachine
    model: str
    """A named shape, or that it is the user's own."""
    parameters: int
    layers: int | None
    random_weights: bool
    batch_size: int
    seq_len: int
    accumulation: int
    dtype: str
    checkpointing: bool
    data: str
    """`random`, `builtin`, or `own`."""
    program: str
    commit: str | None
    torch: str | None
    methods: tuple[SharedMethod, ...]
    gpus: Annotated[int, Field(exclude_if=lambda count: count == 1)] = 1
    schema_version: int = SUBMISSION_VERSION

    @property
    def job(self) -> str:
        return batches_in_short(self)


class _Batches(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def dtype(self) -> str: ...


def batches_in_short(job: _Batches) -> str:
    """`4 x 1024 bf16`, with micro-batches `4 x 1024 x 2 bf16`."""
    micro = f" x {job.accumulation}" if job.accumulation > 1 else ""
    return f"{job.batch_size} x {job.seq_len}{micro} {job.dtype}"
