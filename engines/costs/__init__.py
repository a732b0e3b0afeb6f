"""What a method costs: one file per method, pure arithmetic, no torch.

Each gives its `Traffic`: what it asks of every resource in one step, layer by layer, and of memory by kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engines import entry
from engines.base import ModelShape, Traffic, Workload
from engines.costs import lsp, mezo, native, scripted, torchao_offload, zo2

COSTS: dict[str, Callable[[ModelShape, Workload, Any], Traffic]] = {
    "native": native.traffic,
    "torchao-offload": torchao_offload.traffic,
    "lsp": lsp.traffic,
    "mezo": mezo.traffic,
    "zo2": zo2.traffic,
    "scripted": scripted.traffic,
}


def traffic(engine: str, shape: ModelShape, workload: Workload, settings: Any) -> Traffic:
    """The cost of one step of `engine` with its `settings` (`engines.settings`).

    Raises `UserError` for an unknown engine.
    """
    entry(engine)
    return COSTS[engine](shape, workload, settings)
