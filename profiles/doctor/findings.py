"""What a check of a machine can say, and what it looks at. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from profiles.machine import Gpu, LinkFigures, Machine
from profiles.system.unprobed import System

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    name: str = ""
    """Of its check, which `diagnose` gives it."""
    severity: Severity
    title: str
    evidence: str
    cause: str
    """Likely, not proven."""
    remedy: str


Answer = Finding | str | None
"""A finding, why there can be none, or `None`: in order."""

NO_GPU = "there is no GPU in the profile"

MachineCheck = Callable[[Machine, System | None], Answer]
"""Looks at one thing of a machine; the system is that of this machine, `None` for a saved one."""


def of_machine(judge: Callable[[Machine], Answer]) -> MachineCheck:
    return lambda machine, _: judge(machine)


def of_gpu(judge: Callable[[Gpu, Machine], Answer]) -> MachineCheck:
    """Not judged on a machine without a GPU."""
    return lambda machine, _: NO_GPU if machine.gpu is None else judge(machine.gpu, machine)


def of_link(judge: Callable[[LinkFigures, Machine], Answer]) -> MachineCheck:
    """Not judged on a machine without a GPU, which has no link either."""
    return lambda machine, _: NO_GPU if machine.link is None else judge(machine.link, machine)
