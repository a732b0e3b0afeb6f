"""Where a run ran: hardware, versions and the commit of this project. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import harness
from harness import PROJECT
from harness.records.run import Environment
from profiles.system.cgroup import cpu_name, host_memory, platform_name, usable_cores
from profiles.system.gpu_allocator import allocator_setting
from profiles.system.nvml import LinkState, NvmlDevice, open_device

PACKAGES = ("numpy", "safetensors", "tokenizers", "triton", "torchao", "nvidia-ml-py")
"""Recorded beside torch and transformers where they are installed."""

BUSY_TIMES = 3.0
"""Processes that want to run, over cores, from which a machine is called busy. Just after a probe it is 1 at
most."""


def read_environment() -> Environment:
    """This machine and this program, now. What cannot be read is `None`."""
    device = open_device()
    capability = None if device is None else device.compute_capability
    cores = usable_cores()
    commit, dirty = read_commit(PROJECT)
    return Environment(
        gpu_name=None if device is None else device.name,
        gpu_driver=None if device is None else device.driver,
        gpu_total_bytes=None if device is None else device.total_bytes,
        link=None if device is None else describe_link(device),
        cpu=cpu_name(),
        cores_usable=cores.count,
        host_memory_bytes=host_memory().total_bytes,
        platform=platform_name(),
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        commit=commit,
        dirty=dirty,
        program=harness.__version__,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        notes=(*capability_notes(capability), *busy_notes(os.getloadavg()[0], os.cpu_count() or 1)),
        packages={name: found for name in PACKAGES if (found := _version(name)) is not None},
        gpu_allocator=None if device is None else allocator_setting(),
    )


def gpu_notes() -> tuple[str, ...]:
    """What a person should know of this machine's GPU before a run."""
    device = open_device()
    return capability_notes(None if device is None else device.compute_capability)


def capability_notes(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """What is not as on usual cards with a GPU of this compute capability (major, minor); `None`: no GPU,
    or not known.

    Nothing here needs more than 7.0, but bf16 came into the tensor cores with 8.0.
    """
    if capability is None or capability >= (8, 0):
        return ()
    known = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (7, 0):
        return (
            f"{known} is below 7.0, which the kernels of mezo and zo2 need, and torch may have none for it",
        )
    return (
        f"{known} has no bf16 in hardware: it is emulated, slowly; --dtype fp16 is advised for mezo and zo2, "
        "--dtype fp32 for the other methods; no measurement of ours is of such a card",
    )


def busy_notes(load_average: float, cores: int) -> tuple[str, ...]:
    """What a person should know of other work on this machine: `load_average` processes want its `cores`."""
    if load_average < BUSY_TIMES * cores:
        return ()
    return (
        f"the processor is busy with other work: {load_average:.0f} processes for {cores} cores as the runs "
        "began; steps take longer, and --timeout may end them",
    )


def describe_link(device: NvmlDevice) -> str | None:
    """Such as `PCIe 5 x16`: what device and slot can do. What runs now says nothing while the GPU idles."""
    link: LinkState = device.link()
    if link.generation_max is None or link.width_max is None:
        return None
    return f"PCIe {link.generation_max} x{link.width_max}"


def read_commit(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `folder`, and whether tracked files differ from it.

    (None, None) without git, and where `folder` is not itself the root of a checkout: an installed
    copy may lie inside the checkout of another project.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != folder.resolve():
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else changes != ""


def _git(folder: Path, *arguments: str) -> str | None:
    # Variables such as GIT_DIR, set inside a git hook, would point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
