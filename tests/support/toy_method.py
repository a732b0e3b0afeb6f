"""A method that nobody knows of but its own row: `toy`, whose loss halves in every so many steps.

Its four parts stand in one file here; a real one has them in `engines/methods`, `engines/settings`,
`engines/costs` and `profiles/planning`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from engines import ENGINES
from engines.base import Batch, Context, Evaluation, StepStats
from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.registry_row import EngineEntry
from engines.settings.checks import require
from engines.settings.given import GivenSettings
from engines.shapes import ModelShape, Workload
from profiles.planning.context import Choice, PlanningContext

NAME = "toy"
ROW = EngineEntry(
    target="toy_method:Toy",
    settings="toy_method:ToySettings",
    costs="toy_method:traffic",
    planner="toy_method:choose",
    summary="halves the loss",
    source="this test",
    order="first",
    role="baseline",
    needs_torch=False,
    refuses={"fp16": "cannot train in fp16, being a toy"},
)


def register() -> None:
    """What a new method writes into the table."""
    ENGINES[NAME] = ROW


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    __pydantic_config__ = ConfigDict(extra="forbid")

    half_life: int = 1
    """Steps in which the loss halves."""

    def __post_init__(self) -> None:
        require(self.half_life > 0, "half_life", "must be positive")


def traffic(shape: ModelShape, workload: Workload, settings: ToySettings) -> Traffic:
    return Traffic(
        layers=(LayerTraffic(name="toy", gpu_forward_flops=1e9 * settings.half_life),),
        gpu_memory_bytes={},
        host_memory_bytes={"process": 10**8},
        pinned_bytes=0,
    )


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    if "half_life" in given:
        return Choice(given)
    chosen = context.shape.num_blocks
    return Choice(given.completed(half_life=chosen), (f"half_life={chosen}: one step for each block",))


class Toy:
    name = NAME
    pinned_bytes = 0

    def __init__(self, settings: ToySettings, context: Context) -> None:
        self._settings = settings
        self._step = 0

    @staticmethod
    def why_not_available() -> str | None:
        return None

    def setup(self, blueprint: Any) -> None:
        pass

    def step(self, batches: Sequence[Batch]) -> StepStats:
        loss = 2.0 ** (-self._step / self._settings.half_life)
        self._step += 1
        return StepStats(loss=loss, h2d_bytes=0, d2h_bytes=0)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        return Evaluation(loss=1.0, accuracy=0.5, num_labels=1)

    def weights(self) -> Iterator[tuple[str, Any]]:
        yield from ()

    def save(self, folder: Path) -> None:
        (folder / "toy.json").write_text(json.dumps(self._step), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self._step = json.loads((folder / "toy.json").read_text(encoding="utf-8"))

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass
