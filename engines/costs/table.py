"""What each method's step asks of a machine, by its name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engines import entry
from engines.costs import lsp, mezo, native, scripted, torchao_offload, zo2
from engines.costs.traffic import Traffic
from engines.shapes import ModelShape, Workload

COSTS: dict[str, Callable[[ModelShape, Workload, Any], Traffic]] = {
    "native": native.traffic,
    "torchao-offload": torchao_offload.traffic,
    "lsp": lsp.traffic,
    "mezo": mezo.traffic,
    "zo2": zo2.traffic,
    "scripted": scripted.traffic,
}


def traffic(engine: str, shape: ModelShape, workload: Workload, settings: Any) -> Traffic:
    """The cost of one step of `engine` with its `settings` (`engines.settings.parse`).

    Raises `UserError` for an unknown engine.
    """
    entry(engine)
    return COSTS[engine](shape, workload, settings)
