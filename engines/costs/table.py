"""What each method's step asks of a machine, by its name. Imports no torch."""

from __future__ import annotations

from typing import Any

from engines import entry, load_target
from engines.costs.traffic import Traffic
from engines.shapes import ModelShape, Workload


def traffic(engine: str, shape: ModelShape, workload: Workload, settings: Any) -> Traffic:
    """The cost of one step of `engine` with its typed `settings`.

    Raises `UserError` for an unknown engine.
    """
    cost: Traffic = load_target(entry(engine).costs)(shape, workload, settings)
    return cost
