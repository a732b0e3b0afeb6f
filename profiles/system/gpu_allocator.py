"""How torch's allocator of GPU memory works in each process that trains or measures. Imports no torch.

With expandable segments a stream has one range of addresses for all tensors over 1 MiB. Its pages of 20 MiB
(2 MiB for smaller tensors) are taken from the driver, and given back, one by one, where other segments keep
the size that they were made with: places that one moment of a step has left serve the next, whatever its
tensors' sizes.

What torch's code and its issues say of it (November 2026): pools of CUDA graphs have such segments of their
own; a cap on a process's memory holds, by the whole size of what is asked for; free pages go back when memory
runs short, as with `empty_cache`. Such memory cannot be shared with another process by its handle, which
nothing here does. Windows and Jetson have none, where torch warns; on WSL2 the first tensor can fail
(pytorch/pytorch issue 192330). A graph with NCCL's work hung with it (pytorch/torchtitan issue 3306); those
of engines here have none.
"""

from __future__ import annotations

import os
import platform

SETTING = "PYTORCH_ALLOC_CONF"
"""The environment variable, read as torch starts on the GPU."""

TOLD = (SETTING, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""By any of these a user says how the allocator works. The others are the variable's names of before, which
torch reads where the first is not set."""

EXPANDABLE = "expandable_segments:True"

WITHOUT = ("microsoft", "tegra")
"""In the name of a Linux kernel, of WSL and of Jetson."""


def allocator_environment() -> dict[str, str]:
    """What a process of ours is told beside its environment, unless the user says otherwise or the platform
    has no expandable segments."""
    release = platform.release().lower()
    has_them = platform.system() == "Linux" and not any(word in release for word in WITHOUT)
    is_told = any(name in os.environ for name in TOLD)
    return {SETTING: EXPANDABLE} if has_them and not is_told else {}


def allocator_setting() -> str | None:
    """What torch's allocator is told in processes of ours, by us or by the user; `None`: nothing."""
    told = {**os.environ, **allocator_environment()}
    return next((told[name] for name in TOLD if name in told), None)


def is_expandable(setting: str | None) -> bool:
    """Whether segments are expandable with what the allocator is told."""
    return EXPANDABLE in (setting or "").replace(" ", "").split(",")
