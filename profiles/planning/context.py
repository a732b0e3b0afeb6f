"""What the planners of all methods share: the job, the machine, and what a step with some settings costs.

A planner is a function `choose(context, given)` in a file of its own, named by the method's row in
`engines.ENGINES`. It is pure and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from engines.costs.resources.network import NETWORK_ERROR, network_s
from engines.costs.resources.traffic import Traffic
from engines.costs.table import traffic
from engines.settings.given import GivenSettings, Value
from engines.shapes import ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.budget import Budget, shortages, why_missing
from profiles.planning.layer_times import resource_s
from profiles.planning.plan import Prediction
from profiles.planning.predict import expected_step_s, predict

AS_FAST = 1.01
"""A step within this factor of the fastest counts as equally fast: by the forecast of the whole setting."""

BESIDE_GPU = ("h2d", "d2h", "cpu", "host memory", "disk")
"""Resources that are to hide behind the GPU."""

NETWORK = "network"
"""What limits a step that waits for other machines longer than it takes on its own."""

NO_PRICE = "none: a step is on the same sequences"
"""What a change costs with which a step computes the same."""

GIGABIT_BYTES_PER_S = 125e6
"""What every network between workstations does at least: supposed where nobody names a rate."""

FAST_NETWORK_BYTES_PER_S = 10 * GIGABIT_BYTES_PER_S
"""What it may do then."""


@lru_cache(maxsize=4096)
def _cost(engine: str, shape: ModelShape, workload: Workload, settings: Any) -> Traffic:
    """Kept: planners ask for the same costs again and again, and what-if asks for those of other machines.
    With room for half as many, 18 jobs took 15,500 in place of 9,600; these hold some 100 MB at the most."""
    return traffic(engine, shape, workload, settings)


class Choice(NamedTuple):
    """What a planner settled."""

    settings: GivenSettings
    """Chosen ones beside those given, which are kept."""
    reasons: tuple[str, ...] = ()
    """A sentence per choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingChange:
    """Settings that a planner does not choose by itself, since they make the method train something else, and
    with which it takes less memory."""

    values: Mapping[str, Value]
    quality: str
    """What they cost, for a reader: what is not trained, or only approximately."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningContext:
    """What settings are chosen for."""

    engine: str
    machine: Machine
    shape: ModelShape
    workload: Workload
    budget: Budget
    ranks: int = 1
    """Processes that take a step together, of which this is one: machine, workload and budget are its part
    (`profiles.planning.ranks`)."""
    local_ranks: int = 1
    """Those on its machine, which have some memory together."""
    micro_batches: int = 1
    """Of a whole step, which the ranks divide."""
    network_bytes_per_s: float | None = None
    """Between machines, where there are several; `None`: nobody has named it. No probe measures it."""

    @property
    def nodes(self) -> int:
        return self.ranks // self.local_ranks

    def cost(self, settings: Any) -> Traffic:
        """Of one step with these typed settings."""
        return self.cost_of_one_process(settings).of_a_rank(self.local_ranks)

    def cost_of_one_process(self, settings: Any) -> Traffic:
        """Likewise, if it had all to itself that the ranks of a machine have together."""
        return _cost(self.engine, self.shape, self.workload, settings)

    def predict(self, settings: Any) -> Prediction:
        """Of a step with these typed settings, what it waits for other machines included."""
        alone = predict(self.cost(settings), self.machine, self.workload)
        waited_s = self.network_s(settings)
        if not waited_s:
            return alone
        least_s = waited_s
        if self.network_bytes_per_s is None:
            least_s = self._network_s(settings, FAST_NETWORK_BYTES_PER_S)
        waits = {
            "step_s_low": least_s / NETWORK_ERROR,
            "step_s": waited_s,
            "step_s_high": waited_s * NETWORK_ERROR,
        }
        times: dict[str, Any] = {
            name: None if (time_s := getattr(alone, name)) is None else time_s + each_s
            for name, each_s in waits.items()
        }
        decides = alone.step_s is not None and waited_s > alone.step_s
        return replace(alone, **times, bottleneck=NETWORK if decides else alone.bottleneck)

    @property
    def supposed_network_bytes_per_s(self) -> float:
        """What is reckoned with."""
        return GIGABIT_BYTES_PER_S if self.network_bytes_per_s is None else self.network_bytes_per_s

    def network_s(self, settings: Any) -> float:
        """Seconds that a step waits for other machines; 0 where there are none."""
        return self._network_s(settings, self.supposed_network_bytes_per_s)

    def _network_s(self, settings: Any, bytes_per_s: float) -> float:
        return network_s(self.cost(settings), self.workload, self.ranks, self.nodes, bytes_per_s)

    def step_s(self, settings: Any) -> float | None:
        """Predicted seconds of such a step; `None`: the profile lacks a figure for it."""
        alone = expected_step_s(self.cost(settings), self.machine, self.workload)
        return None if alone is None else alone + self.network_s(settings)

    def resource_s(self, settings: Any) -> dict[str, float] | None:
        """Seconds that each resource is busy in it; `None` likewise."""
        return resource_s(self.cost(settings), self.machine, self.workload)

    def why_missing(self, settings: Any) -> str | None:
        """Why a step with these typed settings does not fit into memory; `None`: it fits."""
        return why_missing(self.cost(settings), self.budget)

    def missing_bytes(self, settings: Any) -> tuple[int, int]:
        """How far these typed settings are from fitting: kinds of memory of which there is too little, and
        bytes missing of all of them."""
        short = shortages(self.cost(settings), self.budget)
        return len(short), sum(each.missing_bytes for each in short)
