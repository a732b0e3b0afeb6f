"""Engines that have taken some steps, for what came of them to be compared bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.base import Batch, StepStats


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    weights: dict[str, Tensor]
    stats: list[StepStats]
    link: Any = None
    """That of an engine that has one."""


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of what `engine` trains, by name."""
    return {name: tensor.clone() for name, tensor in engine.weights()}


def train(engine: Any, batches: Sequence[Batch], per_step: int = 1) -> Outcome:
    stats = [engine.step(batches[i : i + per_step]) for i in range(0, len(batches), per_step)]
    return Outcome([each.loss for each in stats], weights(engine), stats, getattr(engine, "link", None))


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.losses == expected.losses
    assert_same_weights(found.weights, expected.weights)


def late_by_chance(late: random.Random) -> Callable[[Any], Any]:
    """What makes of a function one that is called up to 2 ms later, two times in three at once."""

    def delayed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(late.choice((0.0, 0.0, 0.002)))
            return function(*args, **kwargs)

        return call

    return delayed
