"""What this process may take of its machine, and how it is held to that. The module imports no torch."""

from __future__ import annotations

from harness.runs.emulate import AppliedLimits, Emulated
from profiles.system.cgroup import host_memory, usable_cores


def usable_host_bytes(limit_bytes: int | None) -> int:
    """Host memory that this run may still take: what is available, held to the job's limit."""
    available_bytes = host_memory().available_bytes
    return available_bytes if limit_bytes is None else min(available_bytes, limit_bytes)


def prepare_torch(vram_bytes: int | None, processes: int = 1) -> str:
    """Threads, which so many processes share, and the cap on GPU memory; the device to run on. Imports torch.

    The cap holds torch's allocator; what CUDA itself takes comes on top.
    """
    import torch

    # Explicit: torch would take every core of the host inside a container, or the one of a stray
    # OMP_NUM_THREADS.
    torch.set_num_threads(max(1, usable_cores().count // processes))
    if not torch.cuda.is_available():
        return "cpu"
    if vram_bytes is not None:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total_bytes), 0)
    return "cuda:0"


def applied_limits(
    emulated: Emulated, device_name: str, vram_bytes: int | None, *, own_copies: bool
) -> AppliedLimits:
    """What this process is held to. The link is measured where the engine's copies are ours."""
    rates, gpu_bytes = None, None
    if own_copies:
        import torch

        from engines.transfer.calibrate import measure_rates

        rates = measure_rates(torch.device(device_name), emulated.rates)
    if device_name != "cpu" and vram_bytes is not None:
        import torch

        gpu_bytes = min(vram_bytes, torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()  # of the measurement, not of the run
    return AppliedLimits(threads=usable_cores().count, vram_bytes=gpu_bytes, rates=rates)
