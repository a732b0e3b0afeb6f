"""How much memory a run took, and how much it might have taken: by its job, by the machine it emulates, by
card and host. In bytes, from its record alone; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from harness.records.run import Run
from profiles.machine import Machine

EMULATED_CONTEXT_BYTES = 600_000_000
"""What an emulated card has beside tensors, for CUDA. All records with one hold it; plans have their own."""


def gpu_taken_bytes(run: Run) -> int | None:
    """Peak GPU memory that the run held: what torch reserved, else what its tensors took."""
    reserved = run.summary.peak_gpu_reserved_bytes
    return reserved if reserved is not None else run.summary.peak_gpu_allocated_bytes


def reserves_known(runs: Sequence[Run]) -> bool:
    """Whether what was taken is, for each run, what torch reserved."""
    return all(run.summary.peak_gpu_reserved_bytes is not None for run in runs)


def imposed_gpu_bytes(run: Run) -> int | None:
    """GPU memory that the run was held to, by the emulated machine or by its job; `None`: by neither."""
    limit = _job_limit(run, "vram_bytes")
    if run.emulation is None:
        return limit
    asked = run.emulation.vram_bytes
    return run.emulation.vram_bytes_held or (asked if limit is None else min(asked, limit))


def gpu_limit_bytes(run: Run, machine: Machine | None) -> int | None:
    """GPU memory that the run might use: what it was held to, else the whole card."""
    known = imposed_gpu_bytes(run) or run.environment.gpu_total_bytes
    if known:
        return known
    return machine.gpu.total_bytes if machine is not None and machine.gpu is not None else None


def imposed_card_bytes(run: Run) -> int | None:
    """Size of the card that `run` was to do with, CUDA's context included; `None`: the whole card."""
    if run.emulation is None:
        return imposed_gpu_bytes(run)
    card = run.emulation.vram_bytes + EMULATED_CONTEXT_BYTES
    limit = _job_limit(run, "vram_bytes")
    return card if limit is None else min(card, limit)


def imposed_host_bytes(run: Run) -> int | None:
    """Host memory that the job held the run to; `None`: it named no limit."""
    return _job_limit(run, "host_bytes")


def host_limit_bytes(run: Run) -> int:
    """Host memory that the run might use."""
    return imposed_host_bytes(run) or run.environment.host_memory_bytes


def _job_limit(run: Run, name: str) -> int | None:
    limit = run.job.get("limits", {}).get(name)
    return int(limit) if limit else None
