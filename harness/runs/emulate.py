"""A big machine held to what a smaller one has: GPU memory, link and CPU threads. Imports no torch.

The GPU's speed, the speed of a core and of host memory stay those of the machine that runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from engines.base import LinkRates
from engines.errors import UserError
from harness.records.memory_limits import EMULATED_CONTEXT_BYTES
from harness.records.run import Emulation
from profiles.machine import Figure, LinkFigures, Machine
from profiles.units import format_bytes, format_rate

WITHIN = 0.05
"""Share by which a rate may miss the one asked for and still count as held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulated:
    """What a run is to be held to."""

    machine: str
    """Its name."""
    vram_bytes: int
    """For tensors: CUDA's context and its libraries take their part of a card beside them."""
    threads: int
    rates: LinkRates


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedLimits:
    """What the child was held to, as it found itself."""

    threads: int
    vram_bytes: int | None
    """`None`: there is no GPU."""
    rates: LinkRates | None = None
    """Measured; `None` for engines whose copies are not ours."""


def emulated(machine: Machine) -> Emulated:
    """The caps that make a larger machine like `machine`. Raises `UserError` if its profile lacks one."""
    if machine.gpu is None or machine.link is None:
        raise UserError(f"--emulate '{machine.name}'", "has no GPU or no link", "emulate a machine with both")
    vram_bytes = min(machine.gpu.free_bytes, machine.gpu.total_bytes) - EMULATED_CONTEXT_BYTES
    if vram_bytes <= 0:
        raise UserError(
            f"--emulate '{machine.name}'",
            f"has no GPU memory beside CUDA's context ({format_bytes(machine.gpu.free_bytes)} free)",
            "emulate another machine, or probe it while its GPU is not in use",
        )
    return Emulated(
        machine=machine.name,
        vram_bytes=vram_bytes,
        threads=machine.cpu.cores_usable,
        rates=_rates(machine.name, machine.link),
    )


def _rates(name: str, link: LinkFigures) -> LinkRates:
    def needed(direction: str, figure: Figure) -> float:
        if figure.value is None or figure.value <= 0:
            raise UserError(
                f"--emulate '{name}'",
                f"its profile lacks the pinned rate {direction} ({figure.method})",
                "probe that machine again, or emulate another",
            )
        return figure.value

    return LinkRates(
        h2d_bytes_per_s=needed("to the GPU", link.h2d_pinned_bytes_per_s),
        d2h_bytes_per_s=needed("from the GPU", link.d2h_pinned_bytes_per_s),
        h2d_duplex_bytes_per_s=link.h2d_duplex_bytes_per_s.value,
        d2h_duplex_bytes_per_s=link.d2h_duplex_bytes_per_s.value,
    )


def limit_cpus(count: int) -> None:
    """Let this process and the threads it starts from here on use only the first `count` of its CPUs.

    Before torch is imported: threads that run already keep theirs.
    """
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:count])


def what_is_short(emulation: Emulation) -> list[str]:
    """Where this machine could not be held to, or has less than, what was asked for. One line each."""
    lines = []
    if emulation.link == "not emulated":
        lines.append("link not emulated: a library makes the copies, at the full speed of this machine")
    if emulation.threads_held is not None and emulation.threads_held < emulation.threads:
        lines.append(f"{emulation.threads_held} CPU threads instead of {emulation.threads}: all there are")
    if emulation.vram_bytes_held is not None and emulation.vram_bytes_held < emulation.vram_bytes:
        lines.append(
            f"{format_bytes(emulation.vram_bytes_held)} of GPU memory instead of "
            f"{format_bytes(emulation.vram_bytes)}"
        )
    if emulation.rates_held is None:
        return lines
    for name, direction in (("h2d_bytes_per_s", "to the GPU"), ("d2h_bytes_per_s", "from the GPU")):
        asked, seen = getattr(emulation.rates, name), getattr(emulation.rates_held, name)
        if abs(seen - asked) > WITHIN * asked:
            lines.append(f"link {direction} {format_rate(seen)} instead of {format_rate(asked)}")
    return lines
