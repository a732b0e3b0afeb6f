"""The engine of the rank that leads a training run: what the other ranks have to do with it, they are told.

Every rank's part of a step is told by who takes the steps (`harness.training.steps`), as it is with methods
whose steps are updates that anybody can replay. First-order methods also load a checkpoint together, and some
of them evaluate, save and give their weights together, since no rank has all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import ActsTogether, Batch, Evaluation, StepStats
from engines.world import World

if TYPE_CHECKING:
    from torch import Tensor

STEP = b"step"
"""What ranks that follow are told before each step."""
STATE = b"state"
"""They are told where to go on from (`harness.training.leader.share_state`)."""
END = b""
EVALUATE, WEIGHTS, SAVE, LOAD = "evaluate", "weights", "save", "load"


class LedEngine:
    """An `engines.base.Engine` on rank 0 of several, whose calls the others make with it."""

    def __init__(self, engine: Any, world: World) -> None:
        self.engine = engine
        self.name: str = engine.name
        self.pinned_bytes: int = engine.pinned_bytes
        self._world = world
        self._is_together = isinstance(engine, ActsTogether) and engine.acts_together

    def step(self, batches: Sequence[Batch]) -> StepStats:
        stats: StepStats = self.engine.step(batches)
        return stats

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        if self._is_together:
            self._tell(EVALUATE)
        found: Evaluation = self.engine.evaluate(batches)
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._is_together:
            self._tell(WEIGHTS)
        yield from self.engine.weights()

    def save(self, folder: Path) -> None:
        if self._is_together:
            self._tell(SAVE, folder)
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        self._tell(LOAD, folder)
        self.engine.load(folder)

    def _tell(self, what: str, folder: Path | None = None) -> None:
        where = None if folder is None else str(folder.resolve())
        self._world.broadcast(json.dumps([what, where]).encode("utf-8"))


def obey(engine: Any, order: bytes, evaluation: Sequence[Batch]) -> None:
    """On a rank that follows: the call that a `LedEngine` has told of. `evaluation` are the held-out batches,
    which every rank has."""
    what, where = json.loads(order)
    if what == EVALUATE:
        engine.evaluate(evaluation)
    elif what == WEIGHTS:
        for _ in engine.weights():
            pass
    elif what == SAVE:
        engine.save(Path(where))
    else:
        engine.load(Path(where))
