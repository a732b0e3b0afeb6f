"""What an engine is beside its own words, where all its steps are those of a `TrainingLoop`.

The engine contract has ten methods, and such an engine has something to say in one of them: `setup` makes the
model and the optimizer, and hands them to the loop. What its library keeps outside of the two, it adds to the
methods that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from engines import why_not_installed
from engines.base import Batch, Context, Evaluation, StepStats
from engines.first_order.training_loop import TrainingLoop
from engines.settings.first_order import AdamWSettings

SettingsT = TypeVar("SettingsT", bound=AdamWSettings)


class LoopedEngine(Generic[SettingsT]):
    """All of `engines.base.Engine` but `setup`, which calls `loop.begin`."""

    name: ClassVar[str]
    pinned_bytes: int = 0

    def __init__(self, settings: SettingsT, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.loop = TrainingLoop(self.name, settings, context)

    @classmethod
    def why_not_available(cls) -> str | None:
        """Why this engine cannot run here; `None` if it can."""
        return why_not_installed(cls.name)

    @property
    def notes(self) -> list[str]:
        """What of the settings could not be had, and why."""
        return self.loop.notes

    @property
    def acts_together(self) -> bool:
        """Ranks have parts of the weights: see `engines.base.ActsTogether`."""
        return self.loop.is_sharded

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One update on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        return self.loop.step(batches)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        return self.loop.evaluate(batches)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        return self.loop.weights()

    def save(self, folder: Path) -> None:
        """Weights that are trained, what the optimizer keeps of them, step and random state."""
        self.loop.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        self.loop.load(folder)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.loop.synchronize()

    def close(self) -> None:
        """Let go of the graphs, and give the blocks their own forward back."""
        self.loop.close()
