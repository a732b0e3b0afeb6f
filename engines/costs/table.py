"""What each method's step asks of a machine, by its name. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engines import entry, load_target
from engines.costs.resources.traffic import Traffic
from engines.costs.transformer import COMPILER_HOST_BYTES
from engines.shapes import ModelShape, Workload


def traffic(engine: str, shape: ModelShape, workload: Workload, settings: Any) -> Traffic:
    """The cost of one step of `engine` with its typed `settings`.

    Raises `UserError` for an unknown engine.
    """
    cost: Traffic = load_target(entry(engine).costs)(shape, workload, settings)
    if getattr(settings, "compile", False) is False:
        return cost
    return replace(cost, host_memory_bytes={**cost.host_memory_bytes, "compiler": COMPILER_HOST_BYTES})
