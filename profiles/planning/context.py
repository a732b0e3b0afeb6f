"""What the planners of all methods share: the job, the machine, and what a step with some settings costs.

A planner is a function `choose(context, given)` in a file of its own, named by the method's row in
`engines.ENGINES`. It is pure and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from engines.costs.table import traffic
from engines.costs.traffic import Traffic
from engines.settings.given import GivenSettings
from engines.shapes import ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.budget import Budget, why_missing


class Choice(NamedTuple):
    """What a planner settled."""

    settings: GivenSettings
    """Chosen ones beside those given, which are kept."""
    reasons: tuple[str, ...] = ()
    """A sentence per choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningContext:
    """What settings are chosen for."""

    engine: str
    machine: Machine
    shape: ModelShape
    workload: Workload
    budget: Budget

    def cost(self, settings: Any) -> Traffic:
        """Of one step with these typed settings."""
        return traffic(self.engine, self.shape, self.workload, settings)

    def why_missing(self, settings: Any) -> str | None:
        """Why a step with these typed settings does not fit into memory; `None`: it fits."""
        return why_missing(self.cost(settings), self.budget)
